//! The CUDA backend against the CPU, bit for bit, without a GPU: its kernels, compiled by the machine's C++ compiler and
//! run by the emulator (`crates/cuda/emulator`), behind the same host code. What `tests/gpu.rs` runs, on tiny models.
//!
//! Most of the time goes into compiling, so the models here have all types each: one compilation a shape. It is kept in
//! `target/tmp`. Without a C++ compiler these tests say so and do nothing; with `CI_NEEDS_NVRTC` set they fail instead.

mod bits;

use std::env;
use std::path::Path;

use cuda::{Compiler, Place};

use bits::models::{FUSED, SMALL, SUPER, fused, in_turn, shape};
use bits::{Setup, checks, lockstep, plain};

/// How to run in the emulator, if there is one.
fn setup() -> Option<Setup> {
    if let Err(error) = Compiler::emulated(None) {
        assert!(env::var_os("CI_NEEDS_NVRTC").is_none(), "CI runs every kernel, but: {error}");
        println!("did not run: {error}");
        return None;
    }
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulated");
    let setup = Setup::at(Place::Emulated);
    Some(Setup { cache: Some(cache), context: 320, kv_blocks: 24, ..setup })
}

/// Rows of whole super-blocks, all types: a mixture of experts, or dense.
fn super_types(dense: bool) {
    let Some(setup) = setup() else { return };
    let types = [&SUPER[..], &SMALL].concat();
    for turn in 0..types.len() {
        let model = in_turn(&shape(dense, true, 4, 64), 7, &types, turn);
        checks::sequence(&format!("dense {dense}, turn {turn}"), &model, &setup, &[5, 1, 33, 1], lockstep);
    }
}

/// Rows of small blocks.
fn small_types(dense: bool) {
    let Some(setup) = setup() else { return };
    for turn in 0..SMALL.len() {
        let model = in_turn(&shape(dense, false, 4, 32), 8, &SMALL, turn);
        checks::sequence(&format!("small, dense {dense}, turn {turn}"), &model, &setup, &[5, 1, 33, 1], lockstep);
    }
}

#[test]
fn every_type_in_every_position_of_experts() {
    super_types(false);
}

#[test]
fn every_type_in_every_position_of_a_dense_model() {
    super_types(true);
}

#[test]
fn every_small_type_in_every_position_of_experts() {
    small_types(false);
}

#[test]
fn every_small_type_in_every_position_of_a_dense_model() {
    small_types(true);
}

#[test]
fn fused_decode() {
    let Some(setup) = setup() else { return };
    for setup in [setup.clone(), setup.a8()] {
        for turn in 0..FUSED.len() {
            let model = fused(&shape(false, true, 4, 64), 9, turn);
            let name = format!("{}, turn {turn}", setup.activations.name());
            checks::sequence(&name, &model, &setup, &[1, 1, 70, 1, 2, 1], lockstep);
        }
    }
}

#[test]
fn prompts_of_every_awkward_length() {
    let Some(setup) = setup() else { return };
    let model = fused(&shape(false, true, 4, 64), 10, 0);
    for n in [1, 2, 65, 130] {
        checks::sequence(&format!("prompt {n}"), &model, &setup, &[n, 1, 1], plain);
    }
}

#[test]
fn prompts_in_any_chunks() {
    let Some(setup) = setup() else { return };
    let model = fused(&shape(false, true, 4, 64), 11, 1);
    for chunks in [&[300][..], &[1, 140], &[64, 64, 5], &[100, 1, 3, 64, 20]] {
        let setup = Setup { max_rows: 300, ..setup.clone() };
        checks::sequence(&format!("chunks {chunks:?}"), &model, &setup, chunks, plain);
    }
}

#[test]
fn batches_in_any_order() {
    let Some(setup) = setup() else { return };
    checks::batches(&fused(&shape(false, true, 4, 64), 12, 2), &setup, &[1, 2, 3, 9]);
}

#[test]
fn repeats_agree() {
    let Some(setup) = setup() else { return };
    checks::repeats(&fused(&shape(false, true, 4, 64), 13, 3), &setup, &[1, 3, 70], 8);
}

/// The check must be able to fail.
#[test]
fn another_arithmetic_is_noticed() {
    let Some(setup) = setup() else { return };
    let model = fused(&shape(false, true, 4, 64), 14, 0);
    let failed = std::panic::catch_unwind(|| checks::another_arithmetic(&model, &setup));
    let text = failed.expect_err("a16 is not a8").downcast::<String>().expect("a message");
    assert!(text.contains("differ, first at"), "{text}");
}

#[test]
fn tokens_chosen_by_the_backend_are_the_samplers() {
    let Some(setup) = setup() else { return };
    for graphs in [true, false] {
        let model = fused(&shape(false, true, 4, 64), 15, 1);
        checks::sampling(&model, &Setup { graphs, kv_blocks: 64, ..setup.clone() }, 5);
    }
}
