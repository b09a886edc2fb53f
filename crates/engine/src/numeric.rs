//! Where numbers went wrong: a sequence computed once more, with an eye on everything that every stage writes. Knows nothing
//! of why; that is the debugger's to find.

use model::{BLOCK, Backend, Buffer, Fault, Model, Site, Step, forward};

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
    let mut watched = Watched { backend, from: 0, found: None };
    for rows in tokens.chunks(chunk) {
        // Positions are below the context, which is below 2^32.
        let step = Step::prefill(rows, watched.from as u32, table.to_vec());
        forward(&mut watched, &step)?;
        if watched.found.is_some() {
            break;
        }
        watched.from += rows.len();
    }
    Ok(watched.found)
}

/// A backend that is looked at; once something was found, nothing more is computed.
struct Watched<'a, B> {
    backend: &'a mut B,
    /// Position of the step's first row.
    from: usize,
    found: Option<NonFinite>,
}

impl<B: Backend> Backend for Watched<'_, B> {
    fn model(&self) -> &Model {
        self.backend.model()
    }

    fn max_rows(&self) -> usize {
        self.backend.max_rows()
    }

    fn context(&self) -> usize {
        self.backend.context()
    }

    fn kv_blocks(&self) -> usize {
        self.backend.kv_blocks()
    }

    fn begin(&mut self, step: &Step) -> Result<(), Fault> {
        self.backend.begin(step)
    }

    fn run(&mut self, site: Site) -> Result<(), Fault> {
        if self.found.is_some() {
            return Ok(());
        }
        self.backend.run(site)?;
        for &buffer in site.stage.writes() {
            let values = self.backend.read(buffer)?;
            if let Some(index) = values.iter().position(|value| !value.is_finite()) {
                self.found = Some(NonFinite { site, buffer, from: self.from, index, value: values[index] });
                break;
            }
        }
        Ok(())
    }

    fn read(&mut self, buffer: Buffer) -> Result<Vec<f32>, Fault> {
        self.backend.read(buffer)
    }

    fn write(&mut self, buffer: Buffer, values: &[f32]) -> Result<(), Fault> {
        self.backend.write(buffer, values)
    }

    fn logits(&mut self) -> Result<&[f32], Fault> {
        self.backend.logits()
    }
}
