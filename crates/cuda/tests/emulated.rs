//! The CUDA backend against the CPU, bit for bit, without a GPU: its kernels, compiled by the machine's C++ compiler and
//! run by the emulator (`crates/cuda/emulator`), behind the same host code. What `tests/gpu.rs` runs, on tiny models.
//!
//! Most of the time goes into compiling, so the models here have all types each: one compilation a shape. It is kept in
//! `target/tmp`. Without a C++ compiler these tests say so and do nothing; with `CI_NEEDS_NVRTC` set they fail instead.

mod bits;

use std::path::Path;
use std::process::Command;
use std::{env, fs};

use bits::models::{FUSED, SMALL, SUPER, filled, fused, fused_but, in_turn, q4_k_m, router, shape, uniform};
use bits::{KERNELS, Setup, checks, emulated as setup, lockstep, plain, table, tokens};
use cuda::Place;
use model::{Config, Ffn, Moe, Stage, Step};

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
        checks::sequence(
            &format!("small, dense {dense}, turn {turn}"),
            &model,
            &setup,
            &[5, 1, 33, 1],
            lockstep,
        );
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

/// Kernels of a single row leave work to one another, which must not be left to one that does not run.
#[test]
fn half_fused_decode() {
    let Some(setup) = setup() else { return };
    for matrix in ["attn_q.", "attn_output.", "ffn_gate_exps.", "ffn_down_exps."] {
        let model = fused_but(&shape(false, true, 4, 64), 12, matrix);
        checks::sequence(matrix, &model, &setup, &[1, 1, 3, 1], plain);
    }
}

/// Before Hopper copies are made by warps, products of many rows by warps, and shared memory is smaller.
#[test]
fn other_gpus() {
    let Some(setup) = setup() else { return };
    for arch in [80, 86] {
        let setup = Setup { place: Place::Emulated(arch), ..setup.clone() };
        for turn in 0..2 {
            let model = fused(&shape(false, true, 4, 64), 13, turn);
            checks::sequence(&format!("sm_{arch}, turn {turn}"), &model, &setup, &[1, 1, 70, 1, 2, 1], plain);
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

/// Experts whose scores are all equal, or no numbers: the lowest ids are chosen, by every kernel that chooses.
#[test]
fn experts_that_tie() {
    let Some(setup) = setup() else { return };
    let model = fused(&shape(false, true, 4, 64), 9, 0);
    let equal = filled(&model, |model| router(model, 1), 0.0);
    let no_numbers = filled(&model, |model| &mut model.weights.layers[1].ffn_norm, f32::NAN);
    for (name, model) in [("equal", equal), ("no numbers", no_numbers)] {
        checks::sequence(name, &model, &setup, &[1, 5, 33], lockstep);
        checks::sequence(&format!("{name}, unobserved"), &model, &setup, &[1, 1, 1, 5], plain);
    }
}

/// Heads that Hopper's kernels do not take: what runs elsewhere.
#[test]
fn heads_of_a_length_that_is_no_multiple_of_64() {
    let Some(setup) = setup() else { return };
    let model = uniform(&shape(false, true, 4, 96), 16, gguf::Dtype::Q8_0);
    checks::sequence("heads of 96", &model, &setup, &[100, 1, 5], lockstep);
}

/// More spans than the emulator has processors: attention with rings (`attend_deep.cuh`), of one row and of several.
#[test]
fn contexts_of_spans_enough_for_every_processor() {
    let Some(setup) = setup() else { return };
    let model = fused(&shape(false, true, 4, 64), 17, 3);
    let setup = Setup { context: 900, ..setup };
    checks::sequence("deep", &model, &setup, &[256, 256, 250, 1, 1, 3, 1], plain);
}

/// Rows of eight slices, and of three, whose rings go round many times in each of the emulator's processors
/// (`product_stream.cu`): while a warp is slow, others come upon slots and terms of laps before and after its own.
#[test]
fn rings_that_go_round_while_a_warp_is_slow() {
    let Some(setup) = setup() else { return };
    let mut shape = shape(false, true, 4, 64);
    let ffn = Ffn::Moe(Moe { experts: 6, used: 3, width: 768, renormalise: true, scale: 1.0 });
    shape.config = Config { hidden: 2048, vocab: 3000, ffn, ..shape.config };
    checks::sequence("long rows", &q4_k_m(&shape, 18), &setup, &[3, 2, 2], plain);
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

#[test]
fn tokens_after_penalties_are_the_samplers() {
    let Some(setup) = setup() else { return };
    for graphs in [true, false] {
        let model = fused(&shape(false, true, 4, 64), 15, 1);
        checks::penalised(&model, &Setup { graphs, kv_blocks: 64, ..setup.clone() }, 14);
    }
}

/// `bench --stages` takes a step apart; what it leaves behind harms no step after it.
#[test]
fn kernels_of_a_step_are_timed_alone() {
    let Some(setup) = setup() else { return };
    let model = fused(&shape(false, true, 4, 64), 9, 0);
    let (mut cpu, mut cuda) = (setup.cpu(&model), setup.cuda(&model));
    let layers = model.config.layers;
    for (rows, router, readers) in [(1, 1, "decode_route"), (70, 3, "float_tile_wide")] {
        let step = Step::prefill(&tokens(1, rows, model.config.vocab), 0, table(rows));
        let times = cuda.profile(&step, 1).unwrap();
        assert!(times.iter().flat_map(|t| &t.kernels).all(|k| k.count > 0 && k.micros > 0.0), "{times:?}");
        let route = times.iter().find(|time| time.stage == Stage::Route).expect("a mixture of experts");
        let names: Vec<_> = route.kernels.iter().map(|kernel| kernel.name).collect();
        assert!(names.len() == router && names.contains(&readers), "{rows} rows: {names:?}");
        assert!(route.kernels.iter().all(|kernel| kernel.count == layers), "{route:?}");
        plain(&format!("{rows} rows, after a profile"), &mut cpu, &mut cuda, &step);
    }
}

/// After a whole step (launched, recorded, replayed) a buffer has the CPU's bits, or cannot be read.
#[test]
fn what_is_no_longer_there_cannot_be_read() {
    let Some(setup) = setup() else { return };
    for (dense, rows) in [(false, 1), (false, 5), (true, 1)] {
        let model = fused(&shape(dense, true, 4, 64), 9, 0);
        checks::reads_after_a_step(&format!("dense {dense}"), &model, &setup, rows, 4);
    }
}

/// A step of each kind through most kernels, for [`a_fault_in_a_kernel_is_noticed`].
#[test]
#[ignore = "run by another test, with kernels that have a fault"]
fn a_little_of_everything() {
    let setup = setup().expect("the test that runs this one has looked");
    let model = fused(&shape(false, true, 4, 64), 9, 0);
    checks::sequence("a little", &model, &setup, &[70, 1, 1, 2], lockstep);
    // A row that nobody observes takes fewer launches.
    checks::sequence("a little, unobserved", &model, &setup, &[5, 1, 1], plain);
    checks::counted(&model, &setup, 14);
}

/// A fault: the kernels' file, a text in it, what stands there instead, and what the run has to say.
struct Fault {
    file: &'static str,
    right: &'static str,
    wrong: &'static str,
    says: &'static str,
}

/// Faults of arithmetic, and of order: what is forgotten in these shows on a GPU now and then.
const FAULTS: &[Fault] = &[
    // The scale of another sub-block.
    Fault {
        file: "dot.cuh",
        right: "h[i] = s0 * even.v[i * 2]",
        wrong: "h[i] = s1 * even.v[i * 2]",
        says: "differ",
    },
    Fault {
        file: "product_open.cuh",
        right: "return scales.x >> (8 * s) & 0xff;",
        wrong: "return scales.x >> (8 * (s ^ 1)) & 0xff;",
        says: "differ",
    },
    // Copies that nobody waits for.
    Fault {
        file: "decode_stream.cuh",
        right: "mbarrier_wait(full + slot, parity);\n",
        wrong: "\n",
        says: "differ",
    },
    Fault {
        file: "attend_groups.cu",
        right: "mbarrier_wait(full + unit % STAGES, unit / STAGES & 1);",
        wrong: "",
        says: "differ",
    },
    Fault {
        file: "product_stream.cu",
        right: "if (!job.values) mbarrier_wait(&s.here, parity);",
        wrong: "",
        says: "differ",
    },
    // A row that does not see its own key.
    Fault { file: "attend_one.cu", right: "if (fresh) patch(keys, slot);", wrong: "", says: "differ" },
    // Warps that do not wait for one another.
    Fault {
        file: "attend_split.cu",
        right: "barrier_sync(1 + tile_of_span, PARTS * 32);",
        wrong: "",
        says: "differ",
    },
    Fault { file: "norm.cuh", right: "__syncthreads();", wrong: "", says: "differ" },
    // A kernel that reads what the one ahead may not have written.
    Fault {
        file: "rope_store.cu",
        right: "wait_dependencies();",
        wrong: "",
        says: "without wait_dependencies()",
    },
    // A window that forgets the prompt's tokens again and again in place of what was chosen.
    Fault {
        file: "sample_adjust.cuh",
        right: "if (slot) *slot = token;",
        wrong: "",
        says: "of SamplerParams",
    },
    // Half a warp at a shuffle.
    Fault {
        file: "decode_ffn.cu",
        right: "if (threadIdx.x >= 32) return;",
        wrong: "if (threadIdx.x >= 16) return;",
        says: "deadlock",
    },
];

#[test]
fn a_fault_in_a_kernel_is_noticed() {
    if setup().is_none() {
        return;
    }
    let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    let run = |folder: &Path| {
        let test = env::current_exe().expect("a test is a program");
        let arguments = ["--exact", "a_little_of_everything", "--ignored", "--nocapture"];
        let run = Command::new(test).args(arguments).env(KERNELS, folder).output();
        let run = run.expect("a test that runs itself");
        (
            run.status.success(),
            [run.stdout, run.stderr].map(|t| String::from_utf8_lossy(&t).into_owned()).concat(),
        )
    };
    let (passed, output) = run(&kernels);
    assert!(passed, "without a fault: {output}");
    for Fault { file, right, wrong, says } in FAULTS {
        let text = fs::read_to_string(kernels.join(file)).expect("a file of kernels");
        assert!(text.contains(right), "{file} has no `{right}` any more: plant another fault there");
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fault");
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).expect("a folder in target/tmp");
        fs::write(folder.join(file), text.replace(right, wrong)).expect("a file in target/tmp");
        let (passed, output) = run(&folder);
        assert!(!passed, "nobody noticed `{wrong}` for `{right}` in {file}");
        assert!(output.contains(says), "`{wrong}` for `{right}` in {file}: {output}");
    }
}
