//! Faults planted on purpose, one at a time: the ways in which such kernels went wrong elsewhere, each with what the
//! debugger must say of it.
//!
//! A fault is planted in the right side alone: in the weights as it sees them, or around its stages ([`Hook`]). Which
//! backend is broken does not matter here; the models that the faults are made for are described, not made. A fault goes
//! into any other model that has what it is about, and says what a model lacks that has not.

mod list;
mod random;
mod stages;
mod state;
mod weights;

use std::collections::BTreeMap;
use std::sync::Arc;

use gguf::Dtype;
use model::rope::{Rope, Scaling};
use model::{Arch, Backend, Buffer, Config, Fault, Ffn, Hook, Hooked, Model, Moe, Site, Spec, Stage};

pub use list::all;
pub use random::Random;

use crate::bisect::{BisectError, Bisection, Options, bisect};
use crate::report::{Class, Report};
use crate::scenario::Scenario;
use crate::side::Side;

/// The model that a fault is made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Host {
    /// Super-blocks of mixed types, as Q4_K_M has them: the first two layers' sensitive tensors Q6_K, then Q4_K.
    Mixed,
    /// Rows that are no whole super-blocks: experts of width 288 in Q8_0.
    Ragged,
}

impl Host {
    /// Its configuration: four layers that run in milliseconds.
    pub fn config(self) -> Config {
        let width = if self == Host::Mixed { 256 } else { 288 };
        Config {
            arch: Arch::Qwen3Moe,
            layers: 4,
            hidden: 512,
            heads: 4,
            kv_heads: 2,
            head_dim: 64,
            vocab: 64,
            context: 8192,
            rms_eps: 1e-6,
            rope: Rope { base: 1e6, scaling: Scaling::None },
            ffn: Ffn::Moe(Moe { experts: 6, used: 2, width, renormalise: true, scale: 1.0 }),
        }
    }

    /// The type of each of its tensors.
    pub fn dtype(self, spec: &Spec) -> Dtype {
        let sensitive = spec.name.contains("attn_v") || spec.name.contains("ffn_down");
        match spec.layer {
            _ if spec.dims.len() == 1 || spec.name.contains("gate_inp") => Dtype::F32,
            _ if self == Host::Ragged => Dtype::Q8_0,
            None => Dtype::Q6K,
            Some(layer) if sensitive && layer < 2 => Dtype::Q6K,
            Some(_) => Dtype::Q4K,
        }
    }

    /// A prompt that reaches into a second tile of attention and is no multiple of anything.
    pub fn prompt(self) -> Vec<u32> {
        (0..70).map(|i: u32| (i * i * 31 + i * 7 + 3) % 64).collect()
    }
}

/// A class without what belongs to it, as a fault expects it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// [`Class::Local`].
    Local,
    /// [`Class::Inherited`] from this stage of the same layer.
    Inherited(Stage),
    /// [`Class::State`].
    State(Scenario),
}

/// What the debugger must name; `None` is not asked for, since the fault has none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expected {
    /// Stage.
    pub stage: Stage,
    /// Layer.
    pub layer: Option<usize>,
    /// Class.
    pub kind: Kind,
    /// Tensors, by their names without layer; empty if the fault is no weight's, and then none may be named.
    pub tensors: &'static [&'static str],
    /// Expert that must be the only one named.
    pub expert: Option<usize>,
    /// Row of the tensor.
    pub row: Option<usize>,
    /// Block of the row.
    pub block: Option<usize>,
    /// Element of the row.
    pub element: Option<usize>,
    /// A feature that must be among those explained, such as `element % 32 = 5`.
    pub feature: Option<&'static str>,
}

/// One way of going wrong.
#[derive(Debug, Clone, Copy)]
pub struct Planted {
    /// Its name.
    pub name: &'static str,
    /// What is wrong.
    pub what: &'static str,
    /// Where it was met.
    pub source: &'static str,
    /// The model it is made for.
    pub host: Host,
    /// What must be said of it.
    pub expected: Expected,
    /// Tokens without which it does not show.
    pub tokens: usize,
    /// Changes to the model of both sides that let the fault show.
    base: Option<fn(&mut Model) -> weights::Fit>,
    way: Way,
}

#[derive(Debug, Clone, Copy)]
enum Way {
    /// The weights or the configuration as the faulty side sees them.
    Model(fn(&mut Model) -> weights::Fit),
    /// In place of a stage.
    Around(Stage, stages::Run),
    /// Around the stages.
    Hook(fn(&Model) -> stages::Made),
}

/// Makes a backend of a model.
pub type Build<'a> = dyn Fn(Arc<Model>) -> Result<Box<dyn Backend>, String> + 'a;

/// What a fault makes of a model: what to build a backend of, and what to put around it.
pub struct Fitted {
    /// The model as the faulty side sees it.
    pub model: Arc<Model>,
    hook: Option<Box<dyn Hook>>,
}

impl Fitted {
    /// A backend of [`Fitted::model`] with the fault in it.
    pub fn around(self, backend: Box<dyn Backend>) -> Box<dyn Backend> {
        match self.hook {
            Some(hook) => Box::new(Hooked::with(backend, hook)),
            None => backend,
        }
    }
}

/// A model in which a fault would change nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the fault {fault} does not fit this model: {lacks}")]
pub struct Misfit {
    /// The fault's name.
    pub fault: &'static str,
    /// What the model lacks.
    pub lacks: String,
}

impl Planted {
    /// The model that both sides are meant to run, made from the host's.
    pub fn model(&self, host: &Model) -> Model {
        let mut model = host.clone();
        if let Some(base) = self.base {
            base(&mut model).expect("made for the host");
        }
        model
    }

    /// Whether it is in the weights or the configuration, not in a stage.
    pub fn in_model(&self) -> bool {
        matches!(self.way, Way::Model(_))
    }

    /// Fits the fault to a model: its host's, or any other that has what the fault is about.
    ///
    /// # Errors
    /// If the model has not: its backend would be as right as any.
    pub fn fit(&self, model: &Arc<Model>) -> Result<Fitted, Misfit> {
        let misfit = |lacks| Misfit { fault: self.name, lacks };
        let hook = match self.way {
            Way::Model(breaks) => {
                let mut broken = Model::clone(model);
                breaks(&mut broken).map_err(misfit)?;
                return Ok(Fitted { model: Arc::new(broken), hook: None });
            }
            Way::Around(stage, run) => stages::around(model, stage, run),
            Way::Hook(made) => made(model),
        };
        Ok(Fitted { model: model.clone(), hook: Some(hook.map_err(misfit)?) })
    }

    /// A backend for `model` with this fault in it.
    pub fn plant(&self, model: &Arc<Model>, build: &Build<'_>) -> Result<Box<dyn Backend>, TrialError> {
        let fitted = self.fit(model)?;
        let backend = build(fitted.model.clone()).map_err(TrialError::Build)?;
        Ok(fitted.around(backend))
    }

    /// Plants it, and lets the debugger find it.
    pub fn find(&self, host: &Model, build: &Build<'_>) -> Result<Trial, TrialError> {
        self.find_with(host, &self.host.prompt(), build)
    }

    fn find_with(&self, host: &Model, prompt: &[u32], build: &Build<'_>) -> Result<Trial, TrialError> {
        let model = Arc::new(self.model(host));
        let mut left = build(model.clone()).map_err(TrialError::Build)?;
        let mut right = self.plant(&model, build)?;
        let mut sides = [Side::live("right way", "a16", &mut left), Side::live("faulty", "a16", &mut right)];
        let bisection = bisect(&model, &mut sides, prompt, &Options::default())?;
        Ok(Trial::of([self.name, self.what, self.source], &self.expected, bisection))
    }
}

/// Why a fault could not be tried.
#[derive(Debug, thiserror::Error)]
pub enum TrialError {
    /// There is no backend.
    #[error("{0}")]
    Build(String),
    /// The model is not one for it.
    #[error(transparent)]
    Misfit(#[from] Misfit),
    /// The debugger failed.
    #[error(transparent)]
    Bisect(#[from] BisectError),
}

/// A fault and what the debugger said of it.
pub struct Trial {
    /// The fault's name.
    pub name: &'static str,
    /// What is wrong.
    pub what: &'static str,
    /// Where it was met.
    pub source: &'static str,
    /// What was found.
    pub bisection: Bisection,
    /// What was not named, or named wrongly.
    pub missed: Vec<String>,
}

impl Trial {
    /// Holds what was found of a fault, given by name, what is wrong and where it was met, against what must be said.
    pub fn of([name, what, source]: [&'static str; 3], expected: &Expected, bisection: Bisection) -> Trial {
        let missed = expected.missed(&bisection.report);
        Trial { name, what, source, bisection, missed }
    }
}

impl Expected {
    /// A fault of this kind in this place, of these tensors; nothing else is asked for.
    pub const fn new(
        stage: Stage,
        layer: Option<usize>,
        kind: Kind,
        tensors: &'static [&'static str],
    ) -> Expected {
        Expected {
            stage,
            layer,
            kind,
            tensors,
            expert: None,
            row: None,
            block: None,
            element: None,
            feature: None,
        }
    }

    /// What `report` does not name as it should.
    pub fn missed(&self, report: &Report) -> Vec<String> {
        let Some(finding) = &report.finding else { return vec!["nothing was found".into()] };
        let mut missed = Vec::new();
        let mut want = |what: &str, holds: bool, found: String| {
            if !holds {
                missed.push(format!("{what}: {found}"));
            }
        };
        let site = Site { stage: self.stage, layer: self.layer };
        want("place", finding.place.site == site, finding.place.to_string());
        let class = match (&finding.class, self.kind) {
            (Class::Local, Kind::Local) => true,
            (Class::Inherited { spoiled_after, .. }, Kind::Inherited(stage)) => {
                *spoiled_after == Some(Site { stage, layer: self.layer }.to_string())
            }
            (Class::State { only }, Kind::State(scenario)) => *only == scenario,
            _ => false,
        };
        want("class", class, format!("{:?}", finding.class));
        let tensors = finding.location.as_ref().map_or(&[][..], |location| &location.tensors);
        let stems: Vec<&str> = tensors
            .iter()
            .map(|t| t.name.strip_suffix(".weight").unwrap_or(&t.name))
            .map(|name| {
                name.strip_prefix("blk.").and_then(|n| n.split_once('.')).map_or(name, |(_, stem)| stem)
            })
            .collect();
        want("tensors", stems == self.tensors, format!("{stems:?}"));
        let Some(first) = tensors.first() else { return missed };
        let same = |want: Option<usize>, found: Option<usize>| want.is_none() || want == found;
        want("expert", self.expert.is_none_or(|e| first.experts == [e]), format!("{:?}", first.experts));
        want("row", same(self.row, first.row), format!("{:?}", first.row));
        want("block", same(self.block, first.block), format!("{:?}", first.block));
        want("element", same(self.element, first.element), format!("{:?}", first.element));
        if let Some(feature) = self.feature {
            let texts: Vec<&str> = finding.features.iter().map(|f| f.text.as_str()).collect();
            want("feature", texts.contains(&feature), format!("{texts:?}"));
        }
        missed
    }
}

/// All trials as a table in Markdown.
pub fn table(trials: &[Trial]) -> String {
    let mut text = String::from(
        "| fault | what is wrong | met in | class | place named | tensor, expert, row, block, element | what failing \
         places share | |\n|---|---|---|---|---|---|---|---|\n",
    );
    for trial in trials {
        let Trial { name, what, source, .. } = trial;
        let (class, place, tensor, feature) = match &trial.bisection.report.finding {
            None => ("none".into(), "none".into(), String::new(), String::new()),
            Some(finding) => {
                let class = match &finding.class {
                    Class::Local => "local".into(),
                    Class::Inherited { spoiled_after, .. } => {
                        format!(
                            "inherited, spoiled by {}",
                            spoiled_after.as_deref().unwrap_or("what was not kept")
                        )
                    }
                    Class::State { only } => format!("state, only {}", only.only()),
                };
                let location = finding.location.as_ref();
                let feature = finding.features.first().map_or(String::new(), |f| f.text.clone());
                (
                    class,
                    format!("{}, {}", finding.place.site, finding.place.buffer),
                    location.map_or(String::new(), cell),
                    feature,
                )
            }
        };
        let named = if trial.missed.is_empty() {
            "found".into()
        } else {
            format!("MISSED {}", trial.missed.join("; "))
        };
        text +=
            &format!("| {name} | {what} | {source} | {class} | {place} | {tensor} | {feature} | {named} |\n");
    }
    let found = trials.iter().filter(|trial| trial.missed.is_empty()).count();
    text + &format!("\n{found} of {} faults named exactly.\n", trials.len())
}

/// A location's tensors in a cell of the table.
fn cell(location: &crate::report::Location) -> String {
    let tensor = |t: &crate::report::TensorPlace| {
        let number = |n: Option<usize>| n.map_or("-".into(), |n: usize| n.to_string());
        let expert = match &t.experts[..] {
            [] => "-".into(),
            [one] => one.to_string(),
            many => format!("{} of them", many.len()),
        };
        let [row, block, element] = [t.row, t.block, t.element].map(number);
        format!("`{}` ({}), {expert}, {row}, {block}, {element}", t.name, t.dtype)
    };
    location.tensors.iter().map(tensor).collect::<Vec<_>>().join("; ")
}

/// Buffers of a step, put back after a stage was run on others.
type Saved = BTreeMap<Buffer, Vec<f32>>;

/// Reads buffers, to be put back.
fn save(inner: &mut dyn Backend, buffers: &[Buffer]) -> Result<Saved, Fault> {
    buffers.iter().map(|&buffer| Ok((buffer, inner.read(buffer)?))).collect()
}

/// Puts them back.
fn restore(inner: &mut dyn Backend, saved: &Saved) -> Result<(), Fault> {
    saved.iter().try_for_each(|(&buffer, values)| inner.write(buffer, values))
}

#[cfg(test)]
mod tests;
