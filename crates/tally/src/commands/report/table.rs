//! Layers and stages in a terminal: a line for each layer, layers that look the same in one, the worst buffer of each stage.

use std::collections::BTreeSet;
use std::io::{self, Write};

use anstyle::{AnsiColor, Style};
use report::{Cell, Run, Step, Tone, View};

use crate::output::printable;

/// Differences from here on are drawn as grave ones: what rounding never makes.
const GRAVE: f64 = 1e-6;

/// See the module.
pub(super) struct LayerTable {
    title: String,
    heads: Vec<String>,
    lines: Vec<Line>,
    counts: String,
}

/// Layers whose cells read the same.
#[derive(Clone, PartialEq)]
struct Line {
    name: String,
    cells: Vec<Mark>,
}

/// What a stage of a layer shows.
#[derive(Clone, PartialEq)]
struct Mark {
    text: String,
    style: Style,
}

impl LayerTable {
    /// Of the step in which the most telling run first goes wrong.
    pub(super) fn of(view: &View) -> LayerTable {
        let Some(run) = view.telling() else {
            return LayerTable {
                title: "no run".into(),
                heads: Vec::new(),
                lines: Vec::new(),
                counts: String::new(),
            };
        };
        let index = run.first.map_or(0, |(step, _)| step);
        let step = &run.steps[index];
        let mut stages: Vec<&str> = view.columns.iter().map(|column| column.stage).collect();
        stages.dedup();
        let mixed: Vec<_> = view
            .types
            .kinds
            .iter()
            .filter(|row| row.layers.iter().collect::<BTreeSet<_>>().len() > 1)
            .collect();
        let marks =
            |layer| stages.iter().map(|stage| mark(run, index, step, Some(layer), stage)).collect::<Vec<_>>();
        let outside = |stage: &str| {
            let name = stage.to_owned();
            let cells = vec![mark(run, index, step, None, stage)];
            (!step.of_stage(None, stage).is_empty()).then_some(Line { name, cells })
        };
        let mut lines: Vec<Line> = outside("embed").into_iter().collect();
        for layers in alike((0..view.layers).map(marks).collect()) {
            let types = mixed.iter().map(|row| {
                let found: BTreeSet<_> =
                    layers.range.clone().filter_map(|i| row.layers.get(i)?.as_deref()).collect();
                Mark { text: found.into_iter().collect::<Vec<_>>().join(" "), style: Style::new() }
            });
            let types: Vec<_> = types.collect();
            let (first, last) = (layers.range.start, layers.range.end - 1);
            let name = if first == last { first.to_string() } else { format!("{first}-{last}") };
            lines.push(Line { name, cells: [layers.marks, types].concat() });
        }
        lines.extend(outside("head"));
        let heads =
            stages.iter().map(|stage| (*stage).to_owned()).chain(mixed.iter().map(|row| row.kind.clone()));
        let of = if run.steps.len() > 1 {
            format!(", step {index} of {}", run.steps.len())
        } else {
            String::new()
        };
        let title = format!("{}{of}: {}", run.name, run.about);
        let counts =
            step.counts().iter().map(|(name, n)| format!("{n} {name}")).collect::<Vec<_>>().join(", ");
        LayerTable { title, heads: heads.collect(), lines, counts }
    }

    pub(super) fn write(&self, view: &View, out: &mut impl Write) -> io::Result<()> {
        let tone = tone(view.tone);
        writeln!(out, "{tone}{}{tone:#}\n{}", printable(&view.headline), printable(&view.verdict))?;
        for sentence in &view.reading {
            writeln!(out, "  {}", printable(sentence))?;
        }
        writeln!(out, "\n{}", printable(&self.title))?;
        let mut widths: Vec<usize> = self.heads.iter().map(|head| head.chars().count()).collect();
        for line in &self.lines {
            for (width, cell) in widths.iter_mut().zip(&line.cells) {
                *width = (*width).max(cell.text.chars().count());
            }
        }
        let names = self.lines.iter().map(|line| line.name.len()).max().unwrap_or(0).max("layer".len());
        let dim = Style::new().dimmed();
        let heads =
            self.heads.iter().zip(&widths).map(|(head, &width)| format!("{:<width$}", printable(head)));
        let heads = heads.collect::<Vec<_>>().join("  ");
        writeln!(out, "  {dim}{:>names$}  {}{dim:#}", "layer", heads.trim_end())?;
        for line in &self.lines {
            write!(out, "  {:>names$}", line.name)?;
            for (i, (cell, &width)) in line.cells.iter().zip(&widths).enumerate() {
                // The last one is not padded, so that no line ends in spaces.
                let pad = if i + 1 == line.cells.len() { 0 } else { width - cell.text.chars().count() };
                write!(out, "  {0}{1}{0:#}{2}", cell.style, printable(&cell.text), " ".repeat(pad))?;
            }
            writeln!(out)?;
        }
        let legend = match view.sides.len() {
            2 => {
                "= all bits equal, ~ within the bound, a number is the NMSE, NaN left/right/both, < the first"
            }
            _ => "the root mean square of what each stage wrote last, NaN, < the first",
        };
        writeln!(out, "  {dim}{legend}{dim:#}")?;
        if !self.counts.is_empty() {
            writeln!(out, "  {dim}{}{dim:#}", self.counts)?;
        }
        for command in &view.reproduce {
            writeln!(out, "\n{}\n  {}", printable(&command.about), printable(&command.line))?;
        }
        Ok(())
    }
}

/// Neighbours whose marks are the same.
struct Alike {
    range: std::ops::Range<usize>,
    marks: Vec<Mark>,
}

fn alike(layers: Vec<Vec<Mark>>) -> Vec<Alike> {
    let mut found: Vec<Alike> = Vec::new();
    for (layer, marks) in layers.into_iter().enumerate() {
        match found.last_mut() {
            Some(last) if last.marks == marks => last.range.end = layer + 1,
            _ => found.push(Alike { range: layer..layer + 1, marks }),
        }
    }
    found
}

fn mark(run: &Run, index: usize, step: &Step, layer: Option<usize>, stage: &str) -> Mark {
    let cells = step.of_stage(layer, stage);
    let first = run.first.filter(|(at, _)| *at == index).map(|(_, i)| &step.cells[i]);
    let here = first.is_some_and(|first| cells.iter().any(|cell| std::ptr::eq(*cell, first)));
    // The worst of the stage's buffers, and of those the first.
    let worst = cells.iter().rev().max_by_key(|cell| gravity(cell));
    let Some(cell) = worst else { return Mark { text: "·".into(), style: Style::new().dimmed() } };
    let mut mark = drawn(cell, cells.last().expect("there is a worst of them"));
    if here {
        mark.text.push_str(" <");
        mark.style = mark.style.bold();
    }
    mark
}

fn gravity(cell: &Cell) -> (u8, u64) {
    let apart = cell.apart.as_ref();
    // Non-negative floats are in the order of their bits.
    let nmse = apart.and_then(|apart| apart.nmse).unwrap_or(0.0).to_bits();
    match cell.status {
        _ if cell.sides.iter().any(|side| !side.counts.all()) => (4, nmse),
        Some(parity::report::Status::Diverge) => (3, nmse),
        Some(parity::report::Status::Missing) => (2, 0),
        _ => (u8::from(apart.is_some_and(|apart| apart.differing > 0)), nmse),
    }
}

fn drawn(cell: &Cell, last: &Cell) -> Mark {
    use parity::report::Status;
    let colour = |colour: AnsiColor| colour.on_default();
    let nmse = || cell.apart.as_ref().and_then(|apart| apart.nmse);
    let number = |v: Option<f64>| v.map_or("?".into(), |v| format!("{v:.0e}"));
    let broken = cell.sides.iter().any(|side| !side.counts.all());
    let (text, style) = match cell.status {
        Some(Status::NanLeft) => ("NaN left".into(), colour(AnsiColor::Magenta)),
        Some(Status::NanRight) => ("NaN right".into(), colour(AnsiColor::Magenta)),
        Some(Status::NanBoth) => ("NaN both".into(), colour(AnsiColor::Magenta)),
        None if broken => ("NaN".into(), colour(AnsiColor::Magenta)),
        None => (
            last.sides.first().and_then(|side| side.rms).map_or("?".into(), |v| format!("{v:.3}")),
            Style::new(),
        ),
        Some(Status::Missing) => ("missing".into(), colour(AnsiColor::Yellow)),
        Some(Status::Match) if cell.apart.as_ref().is_none_or(|apart| apart.differing == 0) => {
            ("=".into(), colour(AnsiColor::Green))
        }
        Some(Status::Match) => (format!("~{}", number(nmse())), colour(AnsiColor::Green)),
        Some(Status::Diverge) => {
            let grave = nmse().is_none_or(|v| v >= GRAVE);
            (number(nmse()), colour(if grave { AnsiColor::Red } else { AnsiColor::Yellow }))
        }
    };
    Mark { text, style }
}

fn tone(tone: Tone) -> Style {
    let colour = match tone {
        Tone::Agree => AnsiColor::Green,
        Tone::Diverge => AnsiColor::Red,
        Tone::NonFinite => AnsiColor::Magenta,
        Tone::Trace => AnsiColor::Blue,
    };
    colour.on_default().bold()
}
