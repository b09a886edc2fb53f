//! How long each stage takes on the GPU.
//!
//! A stage is timed as it runs in a replayed step, without the host's launches in between: a graph of that stage alone,
//! once for each layer, so that its weights come from memory as they do in a real step and not from the cache. The kernels
//! of a stage that has several are timed in the same way, each alone.

use model::{Fault, Site, Stage, Step, forward};

use crate::replay::forward_sites;
use crate::{Cuda, Error, STEP, fault};

/// The time of one stage of one layer.
#[derive(Debug, Clone)]
pub struct StageTime {
    /// The stage.
    pub stage: Stage,
    /// Times a step runs it.
    pub count: usize,
    /// Median microseconds of one.
    pub micros: f64,
    /// Its kernels, in the order of their first launch.
    pub kernels: Vec<KernelTime>,
}

/// The time of a kernel by itself.
#[derive(Debug, Clone, Copy)]
pub struct KernelTime {
    /// Its name in the sources.
    pub name: &'static str,
    /// Times a step launches it for this stage.
    pub count: usize,
    /// Median microseconds of one launch.
    pub micros: f64,
}

impl Cuda {
    /// The time of each stage at this step, the median of `repeats`. Runs the step first, so that every stage works on
    /// values that a step has; what it leaves in the buffers and in the step's cache rows is of no use.
    pub fn profile(&mut self, step: &Step, repeats: usize) -> Result<Vec<StageTime>, Fault> {
        forward(self, step)?;
        self.settle()?;
        let sites = forward_sites(&self.model.config, !step.logits.is_empty());
        let of_stage = |stage: Stage| sites.iter().copied().filter(|s| s.stage == stage).collect::<Vec<_>>();
        let stages = Stage::ALL.into_iter().map(of_stage).filter(|sites| !sites.is_empty());
        stages.map(|sites| self.time_stage(&sites, repeats).map_err(fault(STEP))).collect()
    }

    fn time_stage(&mut self, sites: &[Site], repeats: usize) -> Result<StageTime, Error> {
        let device = self.device.clone();
        device.bind()?;
        let (micros, launched) = device.noting(|| self.time_sites(sites, repeats));
        let micros = micros?;
        let mut names = Vec::new();
        for &name in &launched {
            if !names.contains(&name) {
                names.push(name);
            }
        }
        let mut kernels = Vec::with_capacity(names.len());
        for &name in &names {
            let (all, count) = match names.len() {
                1 => (micros, launched.len()),
                _ => {
                    let (all, count) = device.only(name, || self.time_sites(sites, repeats));
                    (all?, count)
                }
            };
            kernels.push(KernelTime { name, count, micros: all / count as f64 });
        }
        let micros = micros / sites.len() as f64;
        Ok(StageTime { stage: sites[0].stage, count: sites.len(), micros, kernels })
    }

    /// Median microseconds of a graph of what these sites launch.
    fn time_sites(&mut self, sites: &[Site], repeats: usize) -> Result<f64, Error> {
        self.device.begin_capture()?;
        let launched = sites.iter().try_for_each(|s| self.run_stage(s.stage, s.layer.unwrap_or(0)));
        let graph = self.device.end_capture();
        launched?;
        let graph = graph?;
        graph.launch()?;
        let mut times = Vec::with_capacity(repeats);
        for _ in 0..repeats.max(1) {
            times.push(self.device.time(|| graph.launch())?);
        }
        times.sort_unstable_by(f32::total_cmp);
        Ok(f64::from(times[times.len() / 2]) * 1e3)
    }
}
