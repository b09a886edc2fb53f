//! Which parts of a model and of a step a failing stage needs: rows, heads, experts and windows of outputs.

use std::collections::{BTreeMap, BTreeSet};

use gguf::Tensor;
use model::{BLOCK, Buffer, Config, Ffn, Model, Moe, Stage};

use crate::bench::Values;
use crate::localise::Localised;
use crate::pair::Capture;

/// Rows of weights and columns of outputs that are kept around a wrong one: whole tiles of any kernel.
const WINDOW: usize = 256;
/// Rows of the step that are kept, where they do not depend on each other.
const ROWS: usize = 16;

/// Which parts of the model and of the step are kept.
pub(super) struct Cut {
    pub(super) config: Config,
    rows: Vec<usize>,
    /// Of `D` where it is the outputs' dimension, of `F`, or of `V`.
    window: std::ops::Range<usize>,
    /// First query and key/value head.
    heads: [usize; 2],
    /// Experts by their new number.
    experts: Vec<usize>,
    pub(super) tokens: Vec<u32>,
    /// The position of the first row; the others follow.
    pub(super) start: u32,
    /// Of attention, the keys and values of the positions before `start`, `[start, HD]` each.
    pub(super) past: Values,
}

/// The weights that a stage uses, by their names without layer.
pub(super) fn weights_of(stage: Stage, moe: bool) -> &'static [&'static str] {
    match stage {
        Stage::Embed => &["token_embd"],
        Stage::Qkv => &["attn_norm", "attn_q", "attn_k", "attn_v"],
        Stage::RopeStore => &["attn_q_norm", "attn_k_norm"],
        // Storing the keys needs the heads' norms.
        Stage::Attend => &["attn_q_norm", "attn_k_norm"],
        Stage::AttnOut => &["attn_output"],
        Stage::Route => &["ffn_norm", "ffn_gate_inp"],
        Stage::ExpertsUp => &["ffn_gate_exps", "ffn_up_exps"],
        Stage::ExpertsDown => &["ffn_down_exps"],
        Stage::FeedForward if !moe => &["ffn_norm", "ffn_gate", "ffn_up", "ffn_down"],
        Stage::FeedForward => &[],
        Stage::Head => &["output_norm", "output"],
    }
}

impl Cut {
    pub(super) fn new(model: &Model, capture: &Capture, at: &Localised) -> Option<Cut> {
        let (full, stage) = (&model.config, capture.site.stage);
        let step = &capture.step;
        let failing = step.rows[at.location.row].sequence;
        let rows: Vec<usize> = match stage {
            // What depends on positions is kept with all rows of its sequence, which stand together.
            Stage::RopeStore | Stage::Attend => {
                (0..step.rows.len()).filter(|&row| step.rows[row].sequence == failing).collect()
            }
            Stage::Head => vec![at.location.row],
            _ => {
                let first = at.location.row.saturating_sub(ROWS - 1);
                (first..(first + ROWS).min(step.rows.len())).collect()
            }
        };
        let index = &at.location.index;
        let column = *index.last()?;
        let around = |n: usize| {
            let start = column / WINDOW * WINDOW;
            start..(start + WINDOW).min(n)
        };
        let mut config = Config { layers: 1, heads: 1, kv_heads: 1, vocab: 32, ..*full };
        let (mut window, mut heads, mut experts) = (0..0, [0, 0], Vec::new());
        let mut tokens: Vec<u32> = vec![0; rows.len()];
        match stage {
            Stage::Embed => {
                let distinct: BTreeSet<u32> = rows.iter().map(|&row| step.rows[row].token).collect();
                experts = distinct.iter().map(|&token| token as usize).collect(); // the rows that are kept
                let renumbered = |&row: &usize| distinct.iter().position(|&t| t == step.rows[row].token);
                tokens = rows.iter().filter_map(renumbered).map(|at| at as u32).collect();
                config.vocab = experts.len();
            }
            Stage::Qkv | Stage::RopeStore => {
                let head = index[1];
                heads = if at.buffer == Buffer::Q { [head, 0] } else { [0, head] };
            }
            Stage::Attend => {
                let group = full.heads / full.kv_heads;
                heads = [index[1] / group * group, index[1] / group];
                config.heads = group;
            }
            Stage::AttnOut => {
                window = around(full.hidden);
                (config.hidden, config.heads, config.kv_heads) = (window.len(), full.heads, full.kv_heads);
            }
            Stage::Head => {
                window = around(full.vocab);
                config.vocab = window.len();
            }
            _ => {}
        }
        if let Ffn::Moe(moe) = full.ffn {
            let mut cut = Moe { experts: 1, used: 1, width: 32, ..moe };
            match stage {
                Stage::Route => (cut.experts, cut.used) = (moe.experts, moe.used),
                Stage::ExpertsUp | Stage::ExpertsDown => {
                    let chosen = capture.inputs.get(&Buffer::Experts)?;
                    let kept = rows.iter().flat_map(|&row| &chosen[row * moe.used..][..moe.used]);
                    let distinct: BTreeSet<usize> = kept.map(|&e| e as usize).collect();
                    experts = distinct.into_iter().collect();
                    (cut.experts, cut.used) = (experts.len(), moe.used);
                    if stage == Stage::ExpertsUp {
                        window = around(moe.width);
                        cut.width = window.len();
                    } else {
                        window = around(full.hidden);
                        (config.hidden, cut.width) = (window.len(), moe.width);
                    }
                }
                _ => {}
            }
            config.ffn = Ffn::Moe(cut);
        } else if stage != Stage::FeedForward {
            config.ffn = Ffn::Dense { width: 32 };
        }
        let start = match stage {
            Stage::RopeStore | Stage::Attend => step.rows[*rows.first()?].position,
            _ => 0,
        };
        let past = if stage == Stage::Attend {
            past(full, capture, &step.tables[failing as usize], start, heads[1])?
        } else {
            Values::new()
        };
        Some(Cut { config, rows, window, heads, experts, tokens, start, past })
    }

    /// The rows of a weight that are kept, under the name that they have in the cut model.
    pub(super) fn weight(&self, stage: Stage, stem: &str, tensor: &Tensor) -> Tensor {
        let (hd, size) = (self.config.head_dim, tensor.row_bytes());
        let heads = |first: usize, n: usize| (first * hd..(first + n) * hd).collect::<Vec<_>>();
        let within = |expert: usize| {
            let rows = tensor.dims[1];
            self.window.clone().map(move |row| expert * rows + row)
        };
        let rows: Vec<usize> = match (stage, stem) {
            (Stage::Embed, _) => self.experts.clone(),
            (Stage::Qkv, "attn_q") => heads(self.heads[0], 1),
            (Stage::Qkv, "attn_k" | "attn_v") => heads(self.heads[1], 1),
            (Stage::AttnOut, _) | (Stage::Head, "output") => self.window.clone().collect(),
            (Stage::ExpertsUp | Stage::ExpertsDown, _) => {
                self.experts.iter().flat_map(|&e| within(e)).collect()
            }
            _ => (0..tensor.rows()).collect(),
        };
        let data: Vec<u8> =
            rows.iter().flat_map(|&row| &tensor.data[row * size..][..size]).copied().collect();
        let dims = match stage {
            Stage::ExpertsUp | Stage::ExpertsDown => {
                vec![tensor.dims[0], self.window.len(), self.experts.len()]
            }
            _ if tensor.dims.len() == 1 => tensor.dims.clone(),
            _ => vec![tensor.dims[0], rows.len()],
        };
        let top = matches!(stage, Stage::Embed | Stage::Head);
        let name = if top { format!("{stem}.weight") } else { format!("blk.0.{stem}.weight") };
        Tensor { name: name.into(), dtype: tensor.dtype, dims, data: data.into() }
    }

    /// The part of a buffer that is kept.
    pub(super) fn values(
        &self,
        full: &Config,
        capture: &Capture,
        stage: Stage,
        buffer: Buffer,
        values: &[f32],
    ) -> Vec<f32> {
        let shape = buffer.shape(full, capture.step.rows.len(), capture.step.logits.len());
        let lead = shape[0];
        let rows: Vec<usize> = match buffer {
            // A row's place among those that have logits.
            Buffer::Logits => {
                let place = |row: &usize| capture.step.logits.iter().position(|&l| l as usize == *row);
                self.rows.iter().filter_map(place).collect()
            }
            _ => self.rows.clone(),
        };
        let len = values.len() / lead;
        let width = *shape.last().expect("every buffer has a dimension");
        let new = buffer.shape(&self.config, 1, 1);
        let middle = match buffer {
            Buffer::Q | Buffer::Attn => self.heads[0],
            Buffer::K | Buffer::V | Buffer::CacheK | Buffer::CacheV => self.heads[1],
            _ => 0,
        };
        let kept_middle: usize = new[1..new.len() - 1].iter().product();
        let columns = if new[new.len() - 1] < width { self.window.clone() } else { 0..width };
        let mut out = Vec::new();
        for row in rows {
            let line = &values[row * len..][..len];
            for m in middle..middle + kept_middle {
                out.extend_from_slice(&line[m * width..][..width][columns.clone()]);
            }
        }
        if buffer == Buffer::Experts && matches!(stage, Stage::ExpertsUp | Stage::ExpertsDown) {
            let renumbered = |e: &mut f32| {
                let at = self.experts.iter().position(|&old| old == *e as usize);
                *e = at.expect("every chosen expert is kept") as f32;
            };
            out.iter_mut().for_each(renumbered);
        }
        out
    }
}

/// The keys and values that the steps before left in `table` for the positions up to `start`, of one head; none if some are
/// not known.
fn past(config: &Config, capture: &Capture, table: &[u32], start: u32, head: usize) -> Option<Values> {
    // By position; what a later step stored is what is there.
    let mut rows: BTreeMap<u32, [&[f32]; 2]> = BTreeMap::new();
    let (hd, row) = (config.head_dim, config.kv_heads * config.head_dim);
    for stored in &capture.past {
        for (t, at) in stored.step.rows.iter().enumerate() {
            let its = &stored.step.tables[at.sequence as usize];
            let block = at.position as usize / BLOCK; // positions are far below `usize`'s range
            if at.position < start && its.get(block) == table.get(block) {
                let range = t * row + head * hd..t * row + (head + 1) * hd;
                rows.insert(at.position, [stored.k.get(range.clone())?, stored.v.get(range)?]);
            }
        }
    }
    let all: Option<Vec<[&[f32]; 2]>> = (0..start).map(|position| rows.get(&position).copied()).collect();
    let all = all?;
    let of = |which: usize| all.iter().flat_map(|row| row[which]).copied().collect::<Vec<f32>>();
    Some([(Buffer::K, of(0)), (Buffer::V, of(1))].into())
}
