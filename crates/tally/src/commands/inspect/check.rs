//! `--check`: every block read, and those found that hold a NaN or an infinity.
//!
//! Codes and integer scales cannot be wrong in this way; a block is as finite as the floats it stores.

use std::io::{self, Write};

use gguf::{Dtype, Tensor};
use quant::{SmallBlock, SuperBlock, dequantise_row, open_small, open_super};
use rayon::prelude::*;
use serde_json::{Value, json};

use crate::failure::Failure;
use crate::output::{grouped, printable};
use crate::progress::Progress;

/// Findings that are spelled out; all are counted.
const SHOWN: usize = 20;
/// Bytes of one task.
const CHUNK: usize = 1 << 20;

/// What the blocks of a file are like.
pub(super) struct Check {
    tensors: usize,
    blocks: u64,
    /// Blocks with a value that is not finite, for each tensor that has any, in file order.
    bad: Vec<(String, u64)>,
    /// The first [`SHOWN`], in file order.
    first: Vec<Finding>,
}

/// A block that is not finite.
struct Finding {
    tensor: String,
    dtype: Dtype,
    /// Row among the tensor's rows, expert after expert.
    row: usize,
    /// The expert and the row within it, for tensors of three dimensions.
    of_expert: Option<(usize, usize)>,
    /// Block within the row; for float types the element.
    block: usize,
    /// `d`, `dmin`, `m` or `value`.
    field: &'static str,
    value: f32,
}

/// Some blocks of a tensor, or what was found in them.
struct Part<T> {
    tensor: usize,
    first_block: usize,
    content: T,
}

/// Reads all of `tensors` on all threads of the current pool.
pub(super) fn check(tensors: &[Tensor]) -> Check {
    let parts: Vec<Part<&[u8]>> =
        tensors.iter().enumerate().flat_map(|(i, tensor)| parts(i, tensor)).collect();
    let progress = Progress::bytes("checking", tensors.iter().map(|t| t.data.len() as u64).sum());
    let found: Vec<Part<Found>> = parts
        .par_iter()
        .filter_map(|part| {
            let content = scan(tensors[part.tensor].dtype, part.content);
            progress.add(part.content.len() as u64);
            (content.count > 0).then_some(Part {
                tensor: part.tensor,
                first_block: part.first_block,
                content,
            })
        })
        .collect();

    // `usize` is at most 64 bits wide.
    let blocks = tensors.iter().map(|t| (t.data.len() / t.dtype.block_bytes()) as u64).sum();
    let mut check = Check { tensors: tensors.len(), blocks, bad: Vec::new(), first: Vec::new() };
    for Part { tensor, first_block, content } in found {
        let tensor = &tensors[tensor];
        match check.bad.last_mut() {
            Some((name, count)) if **name == *tensor.name => *count += content.count,
            _ => check.bad.push((tensor.name.to_string(), content.count)),
        }
        let left = SHOWN - check.first.len();
        check.first.extend(content.first.into_iter().take(left).map(|bad| finding(tensor, first_block, bad)));
    }
    check
}

fn parts(i: usize, tensor: &Tensor) -> impl Iterator<Item = Part<&[u8]>> {
    let blocks = (CHUNK / tensor.dtype.block_bytes()).max(1);
    let chunks = tensor.data.chunks(blocks * tensor.dtype.block_bytes());
    chunks.enumerate().map(move |(n, content)| Part { tensor: i, first_block: n * blocks, content })
}

/// Bad blocks of a part, the first of them as (block, field, value).
#[derive(Default)]
struct Found {
    count: u64,
    first: Vec<(usize, &'static str, f32)>,
}

impl Found {
    /// Counts the block if any of its floats is not finite.
    fn look(&mut self, block: usize, floats: &[(&'static str, f32)]) {
        if let Some(&(field, value)) = floats.iter().find(|(_, value)| !value.is_finite()) {
            self.count += 1;
            if self.first.len() < SHOWN {
                self.first.push((block, field, value));
            }
        }
    }
}

fn scan(dtype: Dtype, bytes: &[u8]) -> Found {
    let mut found = Found::default();
    let blocks = bytes.chunks_exact(dtype.block_bytes()).enumerate();
    match dtype.block_len() {
        256 => {
            let mut open = SuperBlock::default();
            blocks.for_each(|(i, block)| {
                open_super(dtype, block, &mut open);
                found.look(i, &[("d", open.d), ("dmin", open.dmin)]);
            });
        }
        32 => {
            let mut open = SmallBlock::default();
            blocks.for_each(|(i, block)| {
                open_small(dtype, block, &mut open);
                found.look(i, &[("d", open.d), ("m", open.m)]);
            });
        }
        _ => {
            let mut values = vec![0.0; bytes.len() / dtype.block_bytes()];
            dequantise_row(dtype, bytes, &mut values);
            values.iter().enumerate().for_each(|(i, &value)| found.look(i, &[("value", value)]));
        }
    }
    found
}

fn finding(
    tensor: &Tensor,
    first_block: usize,
    (block, field, value): (usize, &'static str, f32),
) -> Finding {
    let per_row = tensor.row_len() / tensor.dtype.block_len();
    let at = first_block + block;
    let row = at / per_row;
    let of_expert = match *tensor.dims {
        [_, rows, _] => Some((row / rows, row % rows)),
        _ => None,
    };
    let name = printable(&tensor.name).into_owned();
    Finding { tensor: name, dtype: tensor.dtype, row, of_expert, block: at % per_row, field, value }
}

impl Check {
    fn bad_blocks(&self) -> u64 {
        self.bad.iter().map(|(_, count)| count).sum()
    }

    pub(super) fn write(&self, out: &mut impl Write) -> io::Result<()> {
        let (tensors, blocks) = (self.tensors, grouped(self.blocks));
        if self.bad.is_empty() {
            return writeln!(
                out,
                "\nCheck: {blocks} blocks of {tensors} tensors, every scale and weight finite"
            );
        }
        writeln!(out, "\nCheck: {} of {blocks} blocks are not finite", grouped(self.bad_blocks()))?;
        for (tensor, count) in &self.bad {
            writeln!(out, "  {}: {}", printable(tensor), grouped(*count))?;
        }
        let shown = self.first.len() as u64; // at most 20
        writeln!(out, "{}:", if shown < self.bad_blocks() { "The first" } else { "All" })?;
        for Finding { tensor, dtype, row, of_expert, block, field, value } in &self.first {
            let row =
                of_expert.map_or(format!("row {row}"), |(expert, row)| format!("expert {expert}, row {row}"));
            let unit = if *field == "value" { "element" } else { "block" };
            writeln!(out, "  {tensor} ({dtype}): {row}, {unit} {block}: {field} is {value}")?;
        }
        Ok(())
    }

    pub(super) fn to_json(&self) -> Value {
        let finding = |f: &Finding| {
            json!({ "tensor": f.tensor, "type": f.dtype.name(), "row": f.row, "expert": f.of_expert.map(|(e, _)| e),
                    "block": f.block, "field": f.field, "value": f.value.to_string() })
        };
        let tensors = self.bad.iter().map(|(name, count)| (name.clone(), json!(count)));
        json!({
            "blocks": self.blocks, "bad_blocks": self.bad_blocks(), "bad_tensors": Value::Object(tensors.collect()),
            "first": self.first.iter().map(finding).collect::<Value>(),
        })
    }

    /// A failure where a block is not finite.
    pub(super) fn verdict(self) -> Result<(), Failure> {
        if self.bad.is_empty() {
            return Ok(());
        }
        let (blocks, tensors) = (grouped(self.bad_blocks()), self.bad.len());
        Err(Failure::new(format!("{blocks} blocks in {tensors} tensors hold a NaN or an infinity"))
            .hint("the file is damaged or was made from damaged weights: fetch it again, or quantise anew"))
    }
}
