//! From a stage that errs to the weight: which tensor, expert, row, block and element.
//!
//! The buffer that is wrong names the tensor and the row; which part of the row is wrong is asked of both sides by
//! inputs that are zero but in one block, then in one element. A product is linear and its blocks are independent, so
//! what such an input comes to is the fault of that part alone.

mod probe;
mod stages;
mod suspects;

use std::collections::BTreeSet;

use model::{Buffer, Config, Model};

use crate::bench::Bench;
use crate::bisect::BisectError;
use crate::judge::Judge;
use crate::pair::Capture;
use crate::place::Number;
use crate::report::Location;
use probe::Probe;
use suspects::outline;
pub(crate) use suspects::suspects;

/// The part of a location that explanation looks at further.
pub(crate) struct Localised {
    pub(crate) location: Location,
    /// The buffer that is wrong.
    pub(crate) buffer: Buffer,
    /// Where in it.
    pub(crate) wrong: BTreeSet<usize>,
    /// Of the row's input: which elements of the first wrong block err.
    pub(crate) elements: Vec<(usize, bool)>,
}

/// Asks both sides until the place is known.
pub(crate) fn localise(
    model: &Model,
    bench: Option<&mut Bench<'_>>,
    judge: &Judge,
    capture: &Capture,
) -> Result<Option<Localised>, BisectError> {
    let Some((buffer, wrong)) = first_wrong(&model.config, judge, capture) else { return Ok(None) };
    let config = &model.config;
    let shape = shape_of(config, capture, buffer);
    let index = unravel(wrong[0], &shape);
    let row = match buffer {
        // Indices of rows: `usize` is no narrower than u32.
        Buffer::Logits => capture.step.logits[index[0]] as usize,
        _ => index[0],
    };
    let at = capture.step.rows[row];
    let mut location = Location {
        buffer: buffer.name().into(),
        index: index.clone(),
        row,
        token: at.token,
        position: at.position,
        left: Number(capture.left[&buffer][wrong[0]]),
        right: Number(capture.right[&buffer][wrong[0]]),
        wrong: wrong.len(),
        total: capture.left[&buffer].len(),
        tensors: Vec::new(),
        notes: Vec::new(),
    };
    let mut elements = Vec::new();
    if let Some(bench) = bench {
        let mut probe = Probe { model, bench, judge, capture, buffer, shape, wrong: &wrong };
        elements = probe.tensors(&mut location)?;
    } else {
        let tensors = suspects(model, capture.site, buffer, true);
        location.tensors = tensors.iter().map(|t| outline(t)).collect();
        location.notes.push("a dump cannot be probed: block and element are not known".into());
    }
    Ok(Some(Localised { location, buffer, wrong: wrong.into_iter().collect(), elements }))
}

fn shape_of(config: &Config, capture: &Capture, buffer: Buffer) -> Vec<usize> {
    buffer.shape(config, capture.step.rows.len(), capture.step.logits.len())
}

/// The first buffer in which the two part, and where in it.
pub(crate) fn first_wrong(config: &Config, judge: &Judge, capture: &Capture) -> Option<(Buffer, Vec<usize>)> {
    let outputs = capture.site.stage.inside().iter().chain(capture.site.stage.writes());
    outputs.copied().find_map(|buffer| {
        let wrong = wrong_in(config, judge, capture, buffer);
        (!wrong.is_empty()).then_some((buffer, wrong))
    })
}

fn wrong_in(config: &Config, judge: &Judge, capture: &Capture, buffer: Buffer) -> Vec<usize> {
    let (Some(left), Some(right)) = (capture.left.get(&buffer), capture.right.get(&buffer)) else {
        return Vec::new();
    };
    let line = *shape_of(config, capture, buffer).last().expect("every buffer has a dimension");
    judge.wrong(left, right, line, judge.limit(capture.site.stage, buffer, 0))
}

/// Coordinates of a row-major index.
fn unravel(mut index: usize, shape: &[usize]) -> Vec<usize> {
    let mut coordinates: Vec<usize> = shape
        .iter()
        .rev()
        .map(|&n| {
            let c = index % n;
            index /= n;
            c
        })
        .collect();
    coordinates.reverse();
    coordinates
}
