//! A run of two sides whose buffers were compared, as text. Compares nothing.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use model::{Site, Stage};
use parity::report::{Cell, RunFacts, Status};

/// A table, layers by stages: the worst that happened at each.
pub(crate) fn layers(run: &RunFacts) -> String {
    let stages: Vec<Stage> = Stage::ALL
        .into_iter()
        .filter(|&stage| {
            run.cells.iter().any(|cell| cell.place.site.stage == stage && cell.place.site.layer.is_some())
        })
        .collect();
    let mut text = format!("{:<5}", "layer");
    stages.iter().for_each(|stage| text += &format!("  {:<12}", stage.name()));
    text.push('\n');
    let layers: BTreeSet<usize> = run.cells.iter().filter_map(|cell| cell.place.site.layer).collect();
    for layer in layers {
        text += &format!("{layer:<5}");
        for &stage in &stages {
            let site = Site { stage, layer: Some(layer) };
            let worst = run
                .cells
                .iter()
                .filter(|cell| cell.place.site == site)
                .max_by_key(|cell| severity(cell.status));
            let word = worst.map_or("", |cell| cell.status.name());
            text += &format!("  {word:<12}");
        }
        text = text.trim_end().to_owned() + "\n";
    }
    text
}

fn severity(status: Status) -> u8 {
    match status {
        Status::Missing => 0,
        Status::Match => 1,
        Status::Diverge => 2,
        Status::NanBoth => 3,
        Status::NanLeft | Status::NanRight => 4,
    }
}

/// The figures of a buffer: how many bits differ, how far apart the sides are, and how much of each is numbers.
pub(crate) fn figures(cell: &Cell) -> String {
    let f = &cell.figures;
    let cosine = f.apart.cosine.map_or("undefined".into(), |c| format!("{c:.9}"));
    let mut text = format!(
        "{}: {}, {} of {} differ, cosine {cosine}",
        cell.place, cell.status, f.apart.differing, f.total
    );
    if let Some(bound) = cell.bound {
        let _ = write!(text, ", error {:.2e} where {:.2e} is allowed", bound.error, bound.limit);
    }
    let _ = write!(text, "\n  left   {}\n  right  {}\n", f.left, f.right);
    text
}
