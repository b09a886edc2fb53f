//! Checks of the debugger itself: that it names what was broken, and that fixes are held to the faults they mended.

use std::cell::RefCell;
use std::sync::Arc;

use contract::{Figures, Miss, Parameters, Verdict};
use model::{Backend, Model};
use parity::faults::{self, Planted, Trial};
use synth::Shape;

use super::forward::device;
use super::lab::{Lab, Room};

/// Of the random weights; any would do.
const SEED: u64 = 7;

/// Plants `fault` into one of two backends of a device, and lets the debugger loose on both.
fn tried(lab: &mut Lab, on: &str, fault: &Planted) -> Result<Trial, Miss> {
    let host = fault.host;
    let model = synth::model(&Shape { config: host.config(), tied: false }, SEED, |spec| host.dtype(spec));
    // Two sequences of the prompt, side by side in one step.
    let room = Room { context: 2 * host.prompt().len(), sequences: 2 };
    let (lab, unable) = (RefCell::new(lab), RefCell::new(None));
    let build = |model: Arc<Model>| -> Result<Box<dyn Backend>, String> {
        let placed = lab.borrow_mut().place(&model, on, room);
        placed.map(|placed| placed.backend).map_err(|miss| {
            let why = match &miss {
                Miss::Failed { why, .. } | Miss::Unable { why } => why.clone(),
            };
            *unable.borrow_mut() = Some(miss);
            why
        })
    };
    let trial = fault.find(&model, &build);
    // A device that is not there is no debugger that fails.
    trial.map_err(|error| unable.take().unwrap_or_else(|| Miss::failed(format!("{}: {error}", fault.name))))
}

/// Every fault of the debugger's table is named exactly: class, stage, layer, tensor, and whatever else it has.
pub(super) fn named(lab: &mut Lab, parameters: &Parameters, fault: Option<&str>) -> Verdict {
    let all = faults::all();
    let least = parameters.integer("at_least").unwrap_or(1);
    if (all.len() as u64) < least {
        return Err(Miss::failed(format!("{} faults are in the table, fewer than {least}", all.len())));
    }
    for (i, planted) in all.iter().enumerate() {
        let trial = tried(lab, device(parameters), planted)?;
        let missed = match fault {
            // A debugger that takes one fault for another.
            Some(_) => all[(i + 1) % all.len()].expected.missed(&trial.bisection.report),
            None => trial.missed,
        };
        if !missed.is_empty() {
            return Err(Miss::failed(format!("{}: {}", planted.name, missed.join("; "))));
        }
    }
    Ok(Figures::from_iter([("faults_named".into(), all.len().into())]))
}

/// Every fix, given as `FAULT: STAGE LAYER TENSOR` (`-` where there is none), is of a fault in the table, names the place
/// that the table has, and the debugger names it, too, when the fault is planted again.
pub(super) fn accountable(lab: &mut Lab, parameters: &Parameters, fault: Option<&str>) -> Verdict {
    let all = faults::all();
    let fixes = parameters.texts("fixes");
    for fix in &fixes {
        let said = |what: String| Miss::failed(format!("the fix `{fix}`: {what}"));
        let (name, place) =
            fix.split_once(": ").ok_or_else(|| said("not FAULT: STAGE LAYER TENSOR".into()))?;
        let planted = all.iter().find(|planted| planted.name == name);
        let planted = planted.ok_or_else(|| said(format!("there is no fault `{name}` in the table")))?;
        let place = match fault {
            // A fix that blames the tensor that it did not mend, as the record of the layer-6 story did.
            Some(_) => place.replace("ffn_down_exps", "ffn_gate_exps"),
            None => place.to_owned(),
        };
        let expected = &planted.expected;
        let layer = expected.layer.map_or("-".into(), |layer| layer.to_string());
        let tensor = if expected.tensors.is_empty() { "-".into() } else { expected.tensors.join("+") };
        let want = format!("{} {layer} {tensor}", expected.stage);
        if place != want {
            return Err(said(format!("the fault is at {want}")));
        }
        let trial = tried(lab, device(parameters), planted)?;
        if !trial.missed.is_empty() {
            return Err(said(format!("planted again it is not named: {}", trial.missed.join("; "))));
        }
    }
    if fixes.is_empty() {
        return Err(Miss::failed("no fix is listed"));
    }
    Ok(Figures::from_iter([("fixes".into(), fixes.len().into())]))
}
