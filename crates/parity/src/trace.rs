//! Watching a run: a hook that copies named buffers aside after the stages that wrote them, so that what is traced is what
//! runs. Knows no file: [`crate::dump`] writes what was
//! kept.

use std::collections::BTreeSet;

use model::{Backend, Buffer, Fault, Hook, Hooked, Site, Stage, Step};
use serde::{Deserialize, Serialize};

use crate::place::{Number, Place};
use crate::types::LayerTypes;

/// What to keep; everything unless narrowed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Filter {
    /// Layers; `embed` and `head` have none and are kept whatever it says.
    pub layers: Option<BTreeSet<usize>>,
    /// Stages.
    pub stages: Option<BTreeSet<Stage>>,
    /// Positions of rows.
    pub positions: Option<BTreeSet<u32>>,
    /// Experts: of the buffers with a row for each chosen expert, those rows.
    pub experts: Option<BTreeSet<u32>>,
}

fn within<T: Ord>(set: &Option<BTreeSet<T>>, value: &T) -> bool {
    set.as_ref().is_none_or(|set| set.contains(value))
}

impl Filter {
    /// Whether anything after `site` is kept.
    pub fn takes(&self, site: Site) -> bool {
        within(&self.stages, &site.stage) && site.layer.is_none_or(|layer| within(&self.layers, &layer))
    }

    /// The lines of `buffer` to keep, or `None` for all. `chosen` are the step's experts, `[T, K]`.
    fn lines(&self, buffer: Buffer, step: &Step, chosen: &[f32]) -> Option<Vec<usize>> {
        let (by_position, by_expert) =
            (self.positions.is_some(), self.experts.is_some() && per_expert(buffer));
        if !by_position && !by_expert {
            return None;
        }
        let used = (chosen.len() / step.rows.len()).max(1);
        let (lines, row): (usize, Box<dyn Fn(usize) -> usize>) = match buffer {
            // Indices of rows are far below u32's range, and `usize` is no narrower.
            Buffer::Logits => (step.logits.len(), Box::new(|line| step.logits[line] as usize)),
            _ if per_expert(buffer) => (step.rows.len() * used, Box::new(move |line| line / used)),
            _ => (step.rows.len(), Box::new(|line| line)),
        };
        let keeps = |&line: &usize| {
            within(&self.positions, &step.rows[row(line)].position)
                // Ids are small integers, exact as f32. A dense model's one network counts as expert 0.
                && (!by_expert || within(&self.experts, &chosen.get(line).map_or(0, |&e| e as u32)))
        };
        Some((0..lines).filter(keeps).collect())
    }
}

/// Whether a buffer has a line for each row and chosen expert; all others have one for each row.
pub(crate) fn per_expert(buffer: Buffer) -> bool {
    matches!(buffer, Buffer::Gate | Buffer::Up | Buffer::Hidden | Buffer::Down)
}

/// Statistics of one buffer.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Values.
    pub total: usize,
    /// Neither NaN nor infinite.
    pub finite: usize,
    /// NaNs.
    pub nan: usize,
    /// Infinities.
    pub inf: usize,
    /// Index of the first value that is not finite.
    pub first: Option<usize>,
    /// The smallest finite value.
    pub min: Option<Number>,
    /// The largest finite value.
    pub max: Option<Number>,
    /// Mean of the finite values.
    pub mean: f64,
    /// Root of the mean square of the finite values.
    pub rms: f64,
}

impl Summary {
    /// Of `values`; sums in f64 and in order.
    pub fn of(values: &[f32]) -> Summary {
        let f = crate::Finiteness::of(values);
        let (mut sum, mut squares) = (0.0, 0.0);
        for v in values.iter().filter(|v| v.is_finite()).map(|&v| f64::from(v)) {
            sum += v;
            squares += v * v;
        }
        let n = f.finite.max(1) as f64;
        let first = [f.nan_first, f.inf_first].into_iter().flatten().min();
        Summary {
            total: f.total,
            finite: f.finite,
            nan: f.nan,
            inf: f.inf,
            first,
            min: f.finite_min,
            max: f.finite_max,
            mean: sum / n,
            rms: (squares / n).sqrt(),
        }
    }
}

/// A buffer that was kept.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// Where.
    pub place: Place,
    /// Of the whole buffer.
    pub shape: Vec<usize>,
    /// Which lines were kept (rows, or pairs `t * K + rank` of buffers with a line for each chosen expert); `None` for
    /// all.
    pub lines: Option<Vec<usize>>,
    /// Of what was kept.
    pub summary: Summary,
    /// What was kept, unless only statistics were wanted.
    pub values: Option<Vec<f32>>,
}

/// A run that was watched.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Trace {
    /// The steps that ran.
    pub steps: Vec<Step>,
    /// In the order of execution.
    pub entries: Vec<Entry>,
    /// Whether the inside of stages was watched, too.
    pub inside: bool,
    /// The model's tensors by layer and type.
    pub types: Vec<LayerTypes>,
}

/// A backend whose buffers are copied aside.
pub type Traced<B> = Hooked<B, Keep>;

/// Copies buffers aside after the stages that wrote them.
pub struct Keep {
    filter: Filter,
    values: bool,
    trace: Trace,
}

impl Trace {
    /// Watches `inner`, and the inside of its stages if it can; keeps `values`, or else statistics alone.
    pub fn watch<B: Backend>(mut inner: B, filter: Filter, values: bool) -> Traced<B> {
        let inside = inner.observe(true);
        let types = LayerTypes::of(inner.model());
        let trace = Trace { inside, types, ..Trace::default() };
        Hooked::with(inner, Box::new(Keep { filter, values, trace }))
    }

    /// What was watched; ends the watching.
    pub fn of<B: Backend>(traced: Traced<B>) -> Trace {
        let (mut inner, keep) = traced.into_parts();
        inner.observe(false);
        keep.trace
    }
}

impl Hook for Keep {
    fn begin(&mut self, step: &Step) -> Step {
        self.trace.steps.push(step.clone());
        step.clone()
    }

    fn run(&mut self, inner: &mut dyn Backend, step: &Step, site: Site) -> Result<(), Fault> {
        inner.run(site)?;
        if self.filter.takes(site) {
            let inside = if self.trace.inside { site.stage.inside() } else { &[] };
            for &buffer in inside.iter().chain(site.stage.writes()) {
                self.keep(inner, step, site, buffer)?;
            }
        }
        Ok(())
    }

    fn observe(&self, on: bool) -> bool {
        on || self.trace.inside
    }
}

impl Keep {
    fn keep(
        &mut self,
        inner: &mut dyn Backend,
        step: &Step,
        site: Site,
        buffer: Buffer,
    ) -> Result<(), Fault> {
        let values = inner.read(buffer)?;
        let shape = buffer.shape(&inner.model().config, step.rows.len(), step.logits.len());
        let chosen = match self.filter.experts {
            Some(_) if per_expert(buffer) && site.stage != Stage::FeedForward => {
                inner.read(Buffer::Experts)?
            }
            _ => vec![0.0; if per_expert(buffer) { shape[0] * shape[1] } else { 0 }],
        };
        let lines = self.filter.lines(buffer, step, &chosen);
        let values = match &lines {
            None => values,
            Some(lines) => pick(&values, &shape, buffer, lines),
        };
        let place = Place { step: self.trace.steps.len() - 1, site, buffer };
        let summary = Summary::of(&values);
        self.trace.entries.push(Entry {
            place,
            shape,
            lines,
            summary,
            values: self.values.then_some(values),
        });
        Ok(())
    }
}

/// The values of `lines` alone.
pub(crate) fn pick(values: &[f32], shape: &[usize], buffer: Buffer, lines: &[usize]) -> Vec<f32> {
    let len: usize = shape[if per_expert(buffer) { 2 } else { 1 }..].iter().product();
    lines.iter().flat_map(|&line| &values[line * len..][..len]).copied().collect()
}

#[cfg(test)]
mod tests {
    use model::forward;

    use super::*;
    use crate::testing;

    #[test]
    fn traced_is_plain_and_everything_is_there() {
        for dense in [false, true] {
            let model = testing::model(dense, 3);
            let step = Step::prefill(&[5, 6, 7, 8, 9], 0, vec![0]);
            let mut plain = testing::cpu(&model);
            forward(&mut plain, &step).expect("it computes");
            let mut traced = Trace::watch(testing::cpu(&model), Filter::default(), true);
            forward(&mut traced, &step).expect("it computes");
            assert_eq!(traced.logits().expect("they are there"), plain.logits().expect("they are there"));
            let trace = Trace::of(traced);
            assert!(trace.inside);
            let per_layer = if dense { 3 + 3 + 1 + 1 + 5 } else { 3 + 3 + 1 + 1 + 4 + 3 + 2 };
            assert_eq!(trace.entries.len(), 2 + per_layer * model.config.layers, "dense {dense}");
            for entry in &trace.entries {
                let values = entry.values.as_ref().expect("values were asked for");
                assert_eq!(values.len(), entry.shape.iter().product::<usize>(), "{}", entry.place);
                assert_eq!(entry.summary.finite, values.len(), "{}", entry.place);
            }
        }
    }

    #[test]
    fn filters() {
        let model = testing::model(false, 3);
        let step = Step::prefill(&[5, 6, 7, 8, 9], 0, vec![0]);
        let run = |filter: Filter| {
            let mut traced = Trace::watch(testing::cpu(&model), filter, true);
            forward(&mut traced, &step).expect("it computes");
            Trace::of(traced).entries
        };
        let layers = run(Filter { layers: Some([1].into()), ..Filter::default() });
        assert!(layers.iter().all(|e| e.place.site.layer.is_none_or(|l| l == 1)) && layers.len() == 2 + 17);
        let stages = run(Filter { stages: Some([Stage::Route].into()), ..Filter::default() });
        assert_eq!(stages.len(), 4 * model.config.layers);
        let positions = run(Filter { positions: Some([1, 4].into()), ..Filter::default() });
        let all = run(Filter::default());
        for (some, all) in positions.iter().zip(&all) {
            let whole = all.values.as_ref().expect("kept");
            let want = match some.place.buffer {
                Buffer::Logits => whole.clone(),
                _ => {
                    let row = whole.len() / 5;
                    [1, 4].iter().flat_map(|t| &whole[t * row..][..row]).copied().collect()
                }
            };
            assert_eq!(some.values.as_ref().expect("kept"), &want, "{}", some.place);
        }
        let expert = all.iter().find(|e| e.place.buffer == Buffer::Experts).expect("a router");
        let chosen = expert.values.as_ref().expect("kept")[0] as u32;
        let experts = run(Filter { experts: Some([chosen].into()), ..Filter::default() });
        let gate = experts.iter().find(|e| e.place.buffer == Buffer::Gate).expect("experts");
        assert!(
            gate.lines.as_ref().is_some_and(|lines| lines[0] == 0 && lines.len() < 10),
            "{:?}",
            gate.lines
        );
    }
}
