//! FALSIFY-QW3-MOE-GPU-PARITY-001 on the shape that people run: `tally synth qwen3-30b-a3b`, 48 layers of 128 experts in
//! the Q4_K_M mix, three tokens on the CPU and on a GPU. A GPU or a model that is missing is a failure, never a pass.
//!
//! That the check can fail is shown here as well, without a GPU: in the emulator, on a tiny model with a fault.

mod bits;

use std::path::PathBuf;
use std::sync::Arc;

use gguf::{Dtype, File};
use model::Model;
use parity::claim::Refuted;
use synth::Shape;

use bits::models::{fused, shape};
use bits::{Setup, checks, emulated};

/// Names the model's file; without it, the file lies where tools/gpu/session.sh makes it.
const MODEL: &str = "TALLY_TEST_MODEL";
const DEFAULT: &str = "/dev/shm/qwen3-30b-a3b.gguf";
const SHAPE: &str = "qwen3-30b-a3b";

/// The full-size model; fails with what is missing and how to get it.
fn full_size() -> Arc<Model> {
    let path = std::env::var_os(MODEL).map_or_else(|| DEFAULT.into(), PathBuf::from);
    let name = path.display();
    let file = File::open(&path).unwrap_or_else(|error| {
        panic!(
            "this test needs the full-size model: {error}. `tally synth {SHAPE} {name}` makes it; {MODEL} names another"
        )
    });
    let model = Model::load(&file).unwrap_or_else(|error| panic!("{name}: {error}"));
    let want = Shape::named(SHAPE).expect("a named shape").config;
    assert_eq!(model.config, want, "{name} is not of the shape {SHAPE}: a small model proves nothing here");
    Arc::new(model)
}

#[test]
#[ignore = "needs a GPU and the full-size model: just gpu-test"]
fn qwen3_moe_gpu_parity() {
    let model = full_size();
    let setup = Setup { context: 64, max_rows: 64, kv_blocks: 1, ..Setup::gpu() };
    let (mut cpu, mut cuda) = (setup.cpu(&model), setup.cuda(&model));
    let found = checks::parity(&mut cpu, &mut cuda, &mut |line| println!("{line}"));
    found.unwrap_or_else(|refuted| panic!("FALSIFY-QW3-MOE-GPU-PARITY-001: {refuted}"));
}

/// The same check notices a scale that is NaN, weights that are others, and another arithmetic.
#[test]
fn the_parity_check_can_fail() {
    let Some(setup) = emulated() else { return };
    let model = fused(&shape(false, true, 4, 64), 14, 0);
    let check = |right: &Arc<Model>, setup_of_right: &Setup, falls: fn(&Result<(), Refuted>) -> bool| {
        let mut said = Vec::new();
        let (mut cpu, mut cuda) = (setup.cpu(&model), setup_of_right.cuda(right));
        let found = checks::parity(&mut cpu, &mut cuda, &mut |line| said.push(line));
        assert!(falls(&found), "{found:?} after {said:?}");
        assert!(said.len() == 2 && said[0].starts_with("cpu: total 300, finite 300, nan 0,"), "{said:?}");
        assert!(said[1].starts_with("emulated: total 300,"), "{said:?}");
    };
    check(&model, &setup, Result::is_ok);
    check(&model, &setup.a8(), |found| matches!(found, Err(Refuted::Bits { .. })));
    check(
        &with_nan(&model),
        &setup,
        |found| matches!(found, Err(Refuted::NonFinite { side, counts }) if side == "emulated" && counts.nan == 300),
    );
    let other = fused(&shape(false, true, 4, 64), 15, 0);
    check(&other, &setup, |found| matches!(found, Err(Refuted::Cosine(Some(_)))));
}

/// The model with a NaN in the norm before the head.
fn with_nan(model: &Arc<Model>) -> Arc<Model> {
    let mut model = Model::clone(model);
    let norm = &mut model.weights.output_norm;
    assert_eq!(norm.dtype, Dtype::F32);
    let mut bytes = norm.data.to_vec();
    bytes[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    norm.data = bytes.into();
    Arc::new(model)
}
