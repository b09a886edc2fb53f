//! The one decorator of backends: it passes everything on, and lets a hook have its way where the hook wants to. What
//! watches a run, and what breaks one on purpose, are hooks.

use crate::{Backend, Buffer, Chooser, Fault, Model, Site, Step};

/// What is done around the calls to a backend; by default nothing.
pub trait Hook {
    /// The step that the backend is given in place of `step`.
    fn begin(&mut self, step: &Step) -> Step {
        step.clone()
    }

    /// Runs a stage.
    fn run(&mut self, inner: &mut dyn Backend, step: &Step, site: Site) -> Result<(), Fault> {
        let _ = step;
        inner.run(site)
    }

    /// Reads a buffer.
    fn read(&mut self, inner: &mut dyn Backend, buffer: Buffer) -> Result<Vec<f32>, Fault> {
        inner.read(buffer)
    }

    /// Changes logits that are about to be handed out; `observed` is whether another buffer was read or written in this
    /// step.
    fn logits(&mut self, logits: &mut [f32], observed: bool) {
        let _ = (logits, observed);
    }

    /// Whether the inside of stages is to be kept, when somebody asks that it be, or not.
    fn observe(&self, on: bool) -> bool {
        on
    }
}

/// A backend with a hook around it.
pub struct Hooked<B, H: ?Sized> {
    inner: B,
    hook: Box<H>,
    /// What the backend was given.
    step: Step,
    observed: bool,
    logits: Vec<f32>,
}

impl<B: Backend, H: Hook + ?Sized> Hooked<B, H> {
    /// Puts `hook` around `inner`.
    pub fn with(inner: B, hook: Box<H>) -> Hooked<B, H> {
        Hooked { inner, hook, step: Step::default(), observed: false, logits: Vec::new() }
    }

    /// Takes the two apart.
    pub fn into_parts(self) -> (B, Box<H>) {
        (self.inner, self.hook)
    }
}

impl<B: Backend, H: Hook + ?Sized> Backend for Hooked<B, H> {
    fn model(&self) -> &Model {
        self.inner.model()
    }

    fn max_rows(&self) -> usize {
        self.inner.max_rows()
    }

    fn context(&self) -> usize {
        self.inner.context()
    }

    fn kv_blocks(&self) -> usize {
        self.inner.kv_blocks()
    }

    fn begin(&mut self, step: &Step) -> Result<(), Fault> {
        self.step = self.hook.begin(step);
        self.observed = false;
        self.inner.begin(&self.step)
    }

    fn run(&mut self, site: Site) -> Result<(), Fault> {
        self.hook.run(&mut self.inner, &self.step, site)
    }

    fn read(&mut self, buffer: Buffer) -> Result<Vec<f32>, Fault> {
        self.observed |= buffer != Buffer::Logits;
        let mut values = self.hook.read(&mut self.inner, buffer)?;
        if buffer == Buffer::Logits {
            self.hook.logits(&mut values, self.observed);
        }
        Ok(values)
    }

    fn write(&mut self, buffer: Buffer, values: &[f32]) -> Result<(), Fault> {
        self.observed = true;
        self.inner.write(buffer, values)
    }

    fn logits(&mut self) -> Result<&[f32], Fault> {
        self.logits.clear();
        self.logits.extend_from_slice(self.inner.logits()?);
        self.hook.logits(&mut self.logits, self.observed);
        Ok(&self.logits)
    }

    fn observe(&mut self, on: bool) -> bool {
        let wanted = self.hook.observe(on);
        self.inner.observe(wanted) && wanted == on
    }

    /// None: what a backend feeds to itself passes no stage that a hook could see.
    fn chooser(&mut self) -> Option<&mut dyn Chooser> {
        None
    }
}
