//! One side of a comparison: a backend that runs, or a dump of one that has run.

use model::{Backend, Buffer, Fault, Site, Step};

use crate::bisect::BisectError;
use crate::dump::Arithmetic;
use crate::player::{Look, Player};

/// One side of a comparison.
pub struct Side<'a> {
    /// What it is called: a device, or `dump:DIR`.
    pub name: String,
    /// Its rules.
    pub arithmetic: Arithmetic,
    /// What runs, or has run.
    pub engine: Engine<'a>,
}

/// What runs, or has run.
pub enum Engine<'a> {
    /// A backend whose whole cache may be used.
    Live(&'a mut dyn Backend),
    /// A dump.
    Dump(&'a mut Player),
}

impl<'a> Side<'a> {
    /// A backend that follows Tally's rules with these activations (`a16`, `a8`).
    pub fn live(name: &str, activations: &str, backend: &'a mut dyn Backend) -> Side<'a> {
        let arithmetic = Arithmetic::Tally { activations: activations.into() };
        Side { name: name.into(), arithmetic, engine: Engine::Live(backend) }
    }

    /// Whether it is a dump.
    pub fn is_dump(&self) -> bool {
        matches!(self.engine, Engine::Dump(_))
    }

    pub(crate) fn fail(&self) -> impl FnOnce(Fault) -> BisectError + use<> {
        let side = self.name.clone();
        move |source| BisectError::Side { side, source }
    }

    pub(crate) fn begin(&mut self, index: usize, step: &Step) -> Result<(), BisectError> {
        let fail = self.fail();
        match &mut self.engine {
            Engine::Live(backend) => backend.begin(step).map_err(fail),
            Engine::Dump(player) => Ok(player.begin(index)?),
        }
    }

    pub(crate) fn run(&mut self, site: Site) -> Result<(), BisectError> {
        let fail = self.fail();
        match &mut self.engine {
            Engine::Live(backend) => backend.run(site).map_err(fail),
            Engine::Dump(player) => {
                player.run(site);
                Ok(())
            }
        }
    }

    pub(crate) fn look(&mut self, buffer: Buffer) -> Result<Look, BisectError> {
        let fail = self.fail();
        match &mut self.engine {
            Engine::Live(backend) => backend.read(buffer).map(Look::Whole).map_err(fail),
            Engine::Dump(player) => Ok(player.look(buffer)),
        }
    }

    /// Gives a backend a buffer; a dump takes none, and says so by `false`.
    pub(crate) fn give(&mut self, buffer: Buffer, values: &[f32]) -> Result<bool, BisectError> {
        let fail = self.fail();
        match &mut self.engine {
            Engine::Live(backend) => backend.write(buffer, values).map_err(fail).map(|()| true),
            Engine::Dump(_) => Ok(false),
        }
    }

    /// Whether the inside of stages can be read while `on`; of a dump it is there or it is not.
    pub(crate) fn observe(&mut self, on: bool) -> bool {
        match &mut self.engine {
            Engine::Live(backend) => backend.observe(on),
            Engine::Dump(player) => player.dump().manifest.inside,
        }
    }
}
