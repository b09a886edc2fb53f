//! The one forward. A second is refused: what is traced, compared, recorded in a CUDA graph or run on another
//! backend is this function.

use crate::{Backend, Fault, Ffn, Site, Stage, Step};

/// Runs a step through the whole network, leaving its logits in the backend (Qwen3 technical report, 2025; the
/// mixture of experts follows its section 2.1).
pub fn forward<B: Backend + ?Sized>(backend: &mut B, step: &Step) -> Result<(), Fault> {
    let (layers, ffn) = (backend.model().config.layers, backend.model().config.ffn);

    backend.begin(step)?;
    backend.run(Site { stage: Stage::Embed, layer: None })?;
    for layer in 0..layers {
        let mut run = |stage| backend.run(Site { stage, layer: Some(layer) });
        run(Stage::Qkv)?;
        run(Stage::RopeStore)?;
        run(Stage::Attend)?;
        run(Stage::AttnOut)?;
        match ffn {
            Ffn::Dense { .. } => run(Stage::FeedForward)?,
            Ffn::Moe(_) => {
                run(Stage::Route)?;
                run(Stage::ExpertsUp)?;
                run(Stage::ExpertsDown)?;
            }
        }
    }
    if !step.logits.is_empty() {
        backend.run(Site { stage: Stage::Head, layer: None })?;
    }
    Ok(())
}
