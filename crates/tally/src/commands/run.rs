//! `tally run`.

use crate::failure::Failure;

#[derive(clap::Args)]
pub(crate) struct Args {}

impl Args {
    pub(crate) fn run(self) -> Result<(), Failure> {
        Ok(())
    }
}
