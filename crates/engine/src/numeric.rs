//! Where numbers went wrong: a sequence computed once more, with an eye on everything that every stage writes. Knows nothing
//! of why; that is the debugger's to find.

use model::{BLOCK, Backend, Buffer, Fault, Hook, Hooked, Site, Step, forward};

/// The first value that is no number.
#[derive(Debug, Clone, PartialEq)]
pub struct NonFinite {
    /// The stage that wrote it.
    pub site: Site,
    /// What it wrote it to.
    pub buffer: Buffer,
    /// The position in the sequence of the first row of the step that it was in.
    pub from: usize,
    /// Its index in the buffer.
    pub index: usize,
    /// A NaN or an infinity.
    pub value: f32,
}

impl std::fmt::Display for NonFinite {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let NonFinite { site, buffer, .. } = self;
        match site.layer {
            Some(layer) => write!(f, "blk.{layer}.{}.{}", site.stage, buffer.name()),
            None => write!(f, "{}.{}", site.stage, buffer.name()),
        }
    }
}

/// Computes `tokens` from position 0 in the blocks of `table`, which must reach to their end, and looks for the first value
/// that is NaN or infinite. What the blocks held is written again, to the same bits.
///
/// # Errors
/// The backend's.
///
/// # Panics
/// If `table` is too short.
pub fn first_non_finite<B: Backend>(
    backend: &mut B,
    tokens: &[u32],
    table: &[u32],
) -> Result<Option<NonFinite>, Fault> {
    assert!(table.len() * BLOCK >= tokens.len(), "a block for every position");
    // Few rows at a time: every buffer is copied out.
    let chunk = backend.max_rows().min(BLOCK);
    let mut from = 0;
    for rows in tokens.chunks(chunk) {
        let mut watched = Hooked::with(&mut *backend, Box::new(Watch::default()));
        // Positions are below the context, which is below 2^32.
        forward(&mut watched, &Step::prefill(rows, from as u32, table.to_vec()))?;
        let (_, watch) = watched.into_parts();
        if watch.found.is_some() {
            return Ok(watch.found);
        }
        from += rows.len();
    }
    Ok(None)
}

/// Looks at all that is written; once something was found, nothing more is computed.
#[derive(Default)]
struct Watch {
    found: Option<NonFinite>,
}

impl Hook for Watch {
    fn run(&mut self, inner: &mut dyn Backend, step: &Step, site: Site) -> Result<(), Fault> {
        if self.found.is_some() {
            return Ok(());
        }
        inner.run(site)?;
        for &buffer in site.stage.writes() {
            let values = inner.read(buffer)?;
            if let Some(index) = values.iter().position(|value| !value.is_finite()) {
                let from = step.rows[0].position as usize; // `usize` is no narrower than u32
                self.found = Some(NonFinite { site, buffer, from, index, value: values[index] });
                break;
            }
        }
        Ok(())
    }
}
