//! The types of a model's tensors by layer: what a report draws beside the stages.

use model::Model;
use serde::{Deserialize, Serialize};

/// Types of a layer's tensors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LayerTypes {
    /// The layer; none for the embedding and the head.
    pub layer: Option<usize>,
    /// `(GGUF name without layer, type)`.
    pub tensors: Vec<(String, String)>,
}

impl LayerTypes {
    /// Of all of a model's tensors, in the order in which it has them.
    pub(crate) fn of(model: &Model) -> Vec<LayerTypes> {
        let mut all: Vec<LayerTypes> = Vec::new();
        for tensor in model.weights.tensors() {
            let of_layer = tensor.name.strip_prefix("blk.").and_then(|rest| rest.split_once('.'));
            let (layer, stem) = match of_layer {
                Some((layer, stem)) => (layer.parse().ok(), stem),
                None => (None, &*tensor.name),
            };
            let entry = (stem.trim_end_matches(".weight").to_owned(), tensor.dtype.to_string());
            match all.iter_mut().find(|types| types.layer == layer) {
                Some(types) if !types.tensors.contains(&entry) => types.tensors.push(entry),
                Some(_) => {}
                None => all.push(LayerTypes { layer, tensors: vec![entry] }),
            }
        }
        all
    }
}
