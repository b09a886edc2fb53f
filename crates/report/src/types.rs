//! The type map: which type each kind of tensor has in which layer, in rows that stand beside those of the stages.

use std::collections::BTreeMap;

use parity::report::LayerTypes;
use serde::Serialize;

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct TypeMap {
    /// In the order of the model's tensors.
    pub kinds: Vec<TypeRow>,
    /// Tensors outside layers: name and type.
    pub outside: Vec<(String, String)>,
}

/// A kind of tensor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TypeRow {
    /// `ffn_down_exps`.
    pub kind: String,
    /// The type by layer; none in layers that do not have it.
    pub layers: Vec<Option<String>>,
}

impl TypeMap {
    /// Of what a report lists.
    pub fn of(types: &[LayerTypes]) -> TypeMap {
        let layers = types.iter().filter_map(|of| of.layer).max().map_or(0, |last| last + 1);
        let mut map = TypeMap::default();
        let mut places = BTreeMap::new();
        for of in types {
            for (name, dtype) in &of.tensors {
                let kind = name.strip_suffix(".weight").unwrap_or(name);
                let Some(layer) = of.layer else {
                    map.outside.push((kind.to_owned(), dtype.clone()));
                    continue;
                };
                let place = *places.entry(kind).or_insert_with(|| {
                    map.kinds.push(TypeRow { kind: kind.to_owned(), layers: vec![None; layers] });
                    map.kinds.len() - 1
                });
                map.kinds[place].layers[layer] = Some(dtype.clone());
            }
        }
        map
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_kind() {
        let tensor = |name: &str, dtype: &str| (name.to_owned(), dtype.to_owned());
        let of = |layer, tensors: Vec<_>| LayerTypes { layer, tensors };
        let map = TypeMap::of(&[
            of(None, vec![tensor("output.weight", "Q6_K")]),
            of(Some(0), vec![tensor("attn_v.weight", "Q6_K"), tensor("attn_norm.weight", "F32")]),
            of(Some(2), vec![tensor("attn_v.weight", "Q4_K")]),
        ]);
        assert_eq!(map.outside, [tensor("output", "Q6_K")]);
        let row = |kind: &str, layers: [Option<&str>; 3]| TypeRow {
            kind: kind.into(),
            layers: layers.map(|dtype| dtype.map(str::to_owned)).into(),
        };
        assert_eq!(
            map.kinds,
            [row("attn_v", [Some("Q6_K"), None, Some("Q4_K")]), row("attn_norm", [Some("F32"), None, None])]
        );
        assert_eq!(TypeMap::of(&[]), TypeMap::default());
    }
}
