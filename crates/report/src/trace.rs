//! A trace as a [`View`]: one side, whose statistics are drawn and whose values are read for histograms and routing.

use std::collections::BTreeMap;
use std::path::Path;

use model::{Buffer, Stage};
use parity::distribution::Distributions;
use parity::dump::{Dump, DumpError};
use parity::routing::Routing;
use parity::trace::Entry;
use parity::{Finiteness, Summary};

use crate::columns::columns;
use crate::types::TypeMap;
use crate::view::{Cell, Command, Run, Side, SideStats, Step, Tone, View, at, layered, rules, step, word};

impl View {
    /// Of a trace that lies in `dir`, as it was named. Its tensors are read a step at a time; where statistics alone were
    /// kept, there are no histograms.
    pub fn of_trace(dump: &Dump, dir: &Path) -> Result<View, DumpError> {
        let manifest = &dump.manifest;
        let origin = &manifest.origin;
        let mut steps = Vec::new();
        for (index, record) in manifest.steps.iter().enumerate() {
            let mut step = step(record);
            match &record.file {
                Some(_) => of_values(&mut step, index, &dump.read_step(index)?),
                None => {
                    let entries = manifest.entries.iter().filter(|entry| entry.place.step == index);
                    step.cells.extend(entries.map(|entry| cell(&entry.place, entry.stats.as_ref(), None)));
                }
            }
            steps.push(step);
        }
        let bad = |cell: &Cell| cell.sides.iter().any(|side| !side.counts.all());
        let first =
            steps.iter().enumerate().find_map(|(s, step)| Some((s, step.cells.iter().position(bad)?)));
        let seen = |stage, buffer| manifest.entries.iter().any(|entry| at(&entry.place) == (stage, buffer));
        let (columns, outside) = layered(columns(seen));
        let verdict = verdict(&steps, first);
        let mut facts =
            vec![("model".into(), origin.model.clone()), ("made by".into(), origin.producer.clone())];
        facts.extend(origin.fingerprint.iter().map(|print| ("fingerprint".into(), print.clone())));
        facts.extend(origin.kernel_hash.iter().map(|hash| ("kernels".into(), hash.clone())));
        let ids: Vec<_> = manifest.prompt_ids.iter().map(u32::to_string).collect();
        let ids = ids.join(",");
        let layers = manifest.entries.iter().filter_map(|entry| entry.place.site.layer).max();
        Ok(View {
            tone: if first.is_some() { Tone::NonFinite } else { Tone::Trace },
            headline: if first.is_some() { "Not finite".into() } else { "A run, watched".into() },
            verdict,
            reading: Vec::new(),
            sides: vec![Side { name: origin.device.clone(), rules: rules(&origin.arithmetic) }],
            facts,
            prompt_ids: manifest.prompt_ids.clone(),
            columns,
            outside,
            layers: layers.map_or(0, |last| last + 1),
            runs: vec![Run {
                name: "trace".into(),
                about: "one side; nothing was compared".into(),
                steps,
                first,
            }],
            skipped: Vec::new(),
            types: TypeMap::of(&manifest.types),
            finding: None,
            reproduce: vec![Command {
                about: "This run as one side of a comparison".into(),
                line: format!("tally bisect MODEL --ids {ids} --left cpu --right dump:{}", word(dir)),
            }],
        })
    }
}

fn verdict(steps: &[Step], first: Option<(usize, usize)>) -> String {
    let cells = steps.iter().map(|step| step.cells.len()).sum::<usize>();
    let Some((step, index)) = first else {
        return format!("All {cells} buffers that were kept are finite. Nothing was compared.");
    };
    let cell = &steps[step].cells[index];
    let layer = cell.layer.map_or(String::new(), |layer| format!("layer {layer} "));
    let bad = cell.sides.iter().map(|side| side.counts.total - side.counts.finite).sum::<usize>();
    let total = cell.sides.iter().map(|side| side.counts.total).sum::<usize>();
    format!(
        "The first buffer that is not finite is `{}` after {layer}{}, step {step}: {bad} of {total} values. What comes \
         before it is finite.",
        cell.buffer, cell.stage
    )
}

fn of_values(step: &mut Step, index: usize, entries: &[Entry]) {
    let mut routers: BTreeMap<usize, [Option<&[f32]>; 2]> = BTreeMap::new();
    for entry in entries {
        let values = entry.values.as_deref().unwrap_or_default();
        let spread = Distributions::of(values, values);
        step.cells.push(cell(&entry.place, Some(&entry.summary), Some(spread)));
        let which = match entry.place.buffer {
            Buffer::Experts => 0,
            Buffer::RouterLogits => 1,
            _ => continue,
        };
        if let (Stage::Route, Some(layer), None) =
            (entry.place.site.stage, entry.place.site.layer, &entry.lines)
        {
            routers.entry(layer).or_default()[which] = Some(values);
        }
    }
    let rows = step.tokens.len();
    for (layer, values) in routers {
        if let [Some(experts), Some(logits)] = values {
            step.routing.push(Routing::of(index, layer, rows, [experts, logits], [experts, logits]));
        }
    }
}

fn cell(place: &parity::Place, summary: Option<&Summary>, spread: Option<Distributions>) -> Cell {
    Cell {
        layer: place.site.layer,
        stage: place.site.stage.name(),
        buffer: place.buffer.name(),
        status: None,
        sides: summary.map(stats).into_iter().collect(),
        apart: None,
        bound: None,
        near_ties: Vec::new(),
        spread,
    }
}

fn stats(s: &Summary) -> SideStats {
    let first = |n: usize| s.first.filter(|_| n > 0);
    let counts = Finiteness {
        total: s.total,
        finite: s.finite,
        nan: s.nan,
        // The summary has the first of either.
        nan_first: first(s.nan).filter(|_| s.inf == 0),
        inf: s.inf,
        inf_first: first(s.inf).filter(|_| s.nan == 0),
        finite_min: s.min,
        finite_max: s.max,
    };
    SideStats { counts, mean: Some(s.mean), rms: Some(s.rms) }
}
