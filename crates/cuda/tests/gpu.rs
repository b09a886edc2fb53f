//! The CUDA backend against the CPU, bit for bit, on a real GPU: `just gpu-test`.
//!
//! Every test here needs a GPU and is ignored by a plain `cargo test`; run with `--ignored` on a machine without one,
//! it fails and says what is missing. `tests/emulated.rs` runs the same checks, smaller, without one; with
//! `TALLY_TEST_PLACE=emulated` these run in the emulator too, for hours.

mod bits;

use std::path::Path;
use std::sync::Arc;

use cuda::{KernelFiles, Place};
use model::Model;
use quant::fixed::Activations;

use bits::models::{SMALL, SUPER, like_30b, mixed, q4_k_m, shape, uniform};
use bits::{Setup, checks, lockstep, plain};

fn setup() -> Setup {
    match std::env::var("TALLY_TEST_PLACE").as_deref() {
        Ok("emulated") => {
            let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulated");
            Setup { kernels: KernelFiles::cached(cache), ..Setup::at(Place::EMULATED) }
        }
        _ => Setup::gpu(),
    }
}

#[test]
#[ignore = "needs a GPU: just gpu-test"]
fn every_type_in_every_position() {
    let mut models = Vec::new();
    for dense in [false, true] {
        for (k256, types) in [(true, [&SUPER[..], &SMALL].concat()), (false, SMALL.to_vec())] {
            for dtype in types {
                let model = uniform(&shape(dense, k256, 4, if k256 { 64 } else { 32 }), 7, dtype);
                models.push((format!("{dtype} dense {dense} k256 {k256}"), model));
            }
        }
    }
    sequences(&models, &setup(), &[5, 1, 33, 1]);
}

/// Compiles the kernels of all models at once, then compares every stage of each.
fn sequences(models: &[(String, Arc<Model>)], setup: &Setup, chunks: &[usize]) {
    setup.compile(&models.iter().map(|(_, model)| model.clone()).collect::<Vec<_>>());
    for (name, model) in models {
        checks::sequence(name, model, setup, chunks, lockstep);
    }
}

#[test]
#[ignore = "needs a GPU: just gpu-test"]
fn any_mix_of_types() {
    let mut models = Vec::new();
    for seed in 0..8 {
        let (dense, k256) = (seed % 2 == 1, seed % 4 < 2);
        let heads = [4, 8, 2, 3][seed as usize % 4];
        let head_dim = if k256 { 256 / if heads == 3 { 4 } else { heads } } else { 32 };
        if k256 && heads * head_dim % 256 != 0 {
            continue;
        }
        let model = mixed(&shape(dense, k256, heads, head_dim.max(32)), seed, k256);
        models.push((format!("mix {seed}"), model));
    }
    sequences(&models, &setup(), &[7, 1, 2, 65, 1]);
    sequences(&models, &setup().a8(), &[7, 1, 2, 65, 1]);
}

#[test]
#[ignore = "needs a GPU: just gpu-test"]
fn the_mix_that_people_use() {
    let model = q4_k_m(&like_30b(), 3);
    for activations in [Activations::A16, Activations::A8] {
        let setup = Setup { activations, ..setup() };
        let name = format!("Q4_K_M {}", activations.name());
        checks::sequence(&name, &model, &setup, &[3, 1, 1, 70, 2, 1], lockstep);
    }
}

#[test]
#[ignore = "needs a GPU: just gpu-test"]
fn prompts_of_every_awkward_length() {
    let model = q4_k_m(&like_30b(), 4);
    for n in [1, 2, 63, 64, 65, 511, 513, 4097] {
        let setup = Setup { context: 4200, max_rows: 4097, ..setup() };
        checks::sequence(&format!("prompt {n}"), &model, &setup, &[n, 1, 1], plain);
    }
}

#[test]
#[ignore = "needs a GPU: just gpu-test"]
fn prompts_in_any_chunks() {
    let model = q4_k_m(&like_30b(), 5);
    let setup = Setup { max_rows: 1024, ..setup() };
    for chunks in [&[600][..], &[1, 599], &[64, 64, 472], &[255, 1, 3, 64, 277], &[300, 300]] {
        checks::sequence(&format!("chunks {chunks:?}"), &model, &setup, chunks, plain);
    }
}

#[test]
#[ignore = "needs a GPU: just gpu-test"]
fn batches_in_any_order() {
    checks::batches(&q4_k_m(&like_30b(), 6), &setup(), &[1, 2, 3, 8, 17, 64]);
}

#[test]
#[ignore = "needs a GPU: just gpu-test"]
fn a_hundred_repeats_agree() {
    checks::repeats(&q4_k_m(&like_30b(), 8), &setup(), &[1, 3, 130], 100);
}

/// The check must be able to fail.
#[test]
#[ignore = "needs a GPU: just gpu-test"]
#[should_panic(expected = "differ, first at")]
fn another_arithmetic_is_noticed() {
    checks::another_arithmetic(&q4_k_m(&like_30b(), 9), &setup());
}

#[test]
#[ignore = "needs a GPU: just gpu-test"]
fn tokens_chosen_on_the_gpu_are_the_samplers() {
    for graphs in [true, false] {
        checks::sampling(&q4_k_m(&like_30b(), 10), &Setup { graphs, ..setup() }, 60);
    }
}

#[test]
#[ignore = "needs a GPU: just gpu-test"]
fn tokens_after_penalties_are_the_samplers() {
    for graphs in [true, false] {
        checks::penalised(&q4_k_m(&like_30b(), 10), &Setup { graphs, ..setup() }, 60);
    }
}

/// What compute-sanitizer runs.
#[test]
#[ignore = "needs a GPU: just gpu-test"]
fn sanitized() {
    let setup = Setup { context: 256, max_rows: 128, kv_blocks: 4, ..setup() };
    for (dense, k256) in [(false, true), (true, false)] {
        let model = mixed(&shape(dense, k256, 4, if k256 { 64 } else { 32 }), 21, k256);
        checks::a_little_of_everything(&model, &setup);
    }
}
