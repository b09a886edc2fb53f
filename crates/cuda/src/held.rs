//! Which named buffers hold what the current step has written, so that nobody reads what is no longer there.
//!
//! Attention's buffers and those of the feed-forward stages lie in the same memory (`buffers.rs`), one row's queries are
//! rotated where nobody sees them, and `Normed` serves every norm: what a buffer held after its stage, it need not hold
//! at the end of the step. Knows stages and buffers; not where anything lies.

use model::{Buffer, Config, Stage};

use crate::replay::layer_stages;

/// Sets of [`Buffer`]s, a bit each.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Held {
    /// Written by a stage of this step, or from outside.
    written: u32,
    /// And not overwritten by another stage since.
    held: u32,
}

const ATTENTION: [Buffer; 4] = [Buffer::Q, Buffer::K, Buffer::V, Buffer::Attn];
/// `Gate` and `Up` have memory of their own.
const FEED_FORWARD: [Buffer; 2] = [Buffer::Hidden, Buffer::Down];

fn set(buffers: &[Buffer]) -> u32 {
    buffers.iter().fold(0, |set, &buffer| set | 1 << buffer as u32)
}

/// What a stage overwrites beside the buffers that it is there to write.
fn spoilt_by(stage: Stage) -> u32 {
    match stage {
        Stage::Qkv => set(&FEED_FORWARD) | set(&[Buffer::Normed]),
        Stage::RopeStore | Stage::Attend => set(&FEED_FORWARD),
        Stage::ExpertsUp => set(&ATTENTION),
        // And the next layer's norm, where nobody looks in between.
        Stage::ExpertsDown | Stage::FeedForward => set(&ATTENTION) | set(&[Buffer::Normed]),
        Stage::Head => set(&[Buffer::Normed]),
        Stage::Embed | Stage::AttnOut | Stage::Route => 0,
    }
}

impl Held {
    /// `stage` has run, observed or not.
    pub(crate) fn ran(&mut self, stage: Stage, observed: bool) {
        let inside = if observed { set(stage.inside()) } else { 0 };
        self.change(set(stage.writes()) | inside, spoilt_by(stage));
    }

    /// A whole forward has run, unobserved.
    pub(crate) fn ran_forward(&mut self, config: &Config, head: bool) {
        // Each layer leaves what the one before it left.
        let stages = std::iter::once(Stage::Embed).chain(layer_stages(config));
        stages.chain(head.then_some(Stage::Head)).for_each(|stage| self.ran(stage, false));
    }

    /// A buffer was replaced from outside.
    pub(crate) fn wrote(&mut self, buffer: Buffer) {
        let with = |group: &[Buffer]| group.contains(&buffer);
        let spoilt = match () {
            () if with(&ATTENTION) => set(&FEED_FORWARD),
            () if with(&FEED_FORWARD) => set(&ATTENTION),
            () => 0,
        };
        self.change(set(&[buffer]), spoilt);
    }

    fn change(&mut self, written: u32, spoilt: u32) {
        self.written |= written;
        self.held = self.held & !spoilt | written;
    }

    /// Why `buffer` cannot be read now, and what to do about it.
    pub(crate) fn check(self, buffer: Buffer) -> Result<(), String> {
        let bit = set(&[buffer]);
        if self.held & bit != 0 {
            return Ok(());
        }
        let makes = |stage: &Stage| [stage.writes(), stage.inside()].concat().contains(&buffer);
        let writers: Vec<_> = Stage::ALL.iter().filter(|stage| makes(stage)).map(Stage::to_string).collect();
        let writers = writers.join(" or ");
        Err(if self.written & bit == 0 {
            format!("nothing has written it in this step; {writers} does")
        } else {
            format!(
                "a later stage has overwritten it; read it right after {writers}, before the next stage is asked for"
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_its_stage_every_buffer_is_there() {
        for stage in Stage::ALL {
            let mut held = Held::default();
            for buffer in stage.writes().iter().chain(stage.inside()) {
                let error = held.check(*buffer).expect_err("nothing has run");
                assert!(error.contains(&stage.to_string()), "{error}");
            }
            held.ran(stage, true);
            for &buffer in stage.writes().iter().chain(stage.inside()) {
                assert_eq!(held.check(buffer), Ok(()), "{buffer:?} after {stage}");
            }
        }
    }

    #[test]
    fn no_stage_spoils_what_it_reads_before_it_has_run() {
        // What a stage reads is there when the stages before it, or a comparison from outside, have written it.
        for stage in Stage::ALL {
            let mut held = Held::default();
            stage.reads().iter().for_each(|&buffer| held.wrote(buffer));
            for &buffer in stage.reads() {
                assert_eq!(held.check(buffer), Ok(()), "{buffer:?}, which {stage} reads");
            }
        }
    }

    #[test]
    fn a_whole_step_leaves_what_its_end_has_written() {
        let check = |shape: &str, there: &[Buffer], gone: &[Buffer]| {
            let config = synth::Shape::named(shape).expect("a shape of the list").config;
            let mut held = Held::default();
            held.ran_forward(&config, true);
            for &buffer in there {
                assert_eq!(held.check(buffer), Ok(()), "{shape}: {buffer:?}");
            }
            for &buffer in gone {
                let error = held.check(buffer).expect_err("overwritten");
                assert!(error.contains("read it right after"), "{error}");
            }
        };
        use Buffer::*;
        check(
            "tiny-moe",
            &[X, RouterLogits, Experts, ExpertWeights, Hidden, Logits],
            &[Q, K, V, Attn, Normed],
        );
        check("tiny-dense", &[X, Logits], &[Q, K, V, Attn]);
    }
}
