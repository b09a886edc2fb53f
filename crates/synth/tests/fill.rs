//! Random tensors: pinned bytes, parts that join, and weights of the promised mean and deviation.

use gguf::{Dtype, TensorSpec};
use quant::dequantise_row;
use synth::Filler;

const ROW: usize = 512;
const ROWS: usize = 256;

fn bytes(seed: u64, dtype: Dtype, name: &str) -> Vec<u8> {
    let spec = TensorSpec { name: name.into(), dtype, dims: vec![ROW, ROWS] };
    let row = dtype.row_bytes(ROW).expect("blocks of 256 divide the row");
    let mut out = vec![0; row * ROWS];
    Filler::new(seed, &spec).fill(0, &mut out);
    out
}

/// FNV-1a in 64 bits.
fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

#[test]
fn the_same_bytes_everywhere() {
    // Made on x86-64. A change here changes every synthetic model that someone has made and measured: say so in
    // CHANGELOG.md.
    let pinned = [
        (Dtype::F32, 0x242e_9037_9c85_dc61),
        (Dtype::F16, 0xb488_2318_5e28_afda),
        (Dtype::BF16, 0xe125_99a8_4553_d42c),
        (Dtype::Q8_0, 0x20a9_247e_0550_45d2),
        (Dtype::Q4_0, 0x5180_393f_8de1_4894),
        (Dtype::Q4_1, 0x49d3_cfcc_2b31_ff4d),
        (Dtype::Q5_0, 0x39e1_0bcb_aa00_3a8b),
        (Dtype::Q5_1, 0xe2ba_03e9_efd6_e053),
        (Dtype::Q2K, 0xed50_cf43_868e_3b16),
        (Dtype::Q3K, 0x7037_9ea9_d652_e3fb),
        (Dtype::Q4K, 0xacb6_bd91_4b22_7c59),
        (Dtype::Q5K, 0x9213_b997_e52f_ce31),
        (Dtype::Q6K, 0x435a_938d_8383_35dd),
    ];
    assert_eq!(pinned.map(|(dtype, _)| dtype), Dtype::ALL);
    let found = pinned.map(|(dtype, _)| (dtype, hash(&bytes(7, dtype, "blk.0.attn_q.weight"))));
    assert_eq!(found, pinned, "found {found:#x?}");
}

#[test]
fn seed_and_name_matter() {
    for dtype in Dtype::ALL {
        let found = [bytes(1, dtype, "a"), bytes(2, dtype, "a"), bytes(1, dtype, "b")];
        for (i, j) in [(0, 1), (0, 2), (1, 2)] {
            let same = found[i].iter().zip(&found[j]).filter(|(a, b)| a == b).count();
            // Scales are drawn from few values, and floats of one size share their exponents.
            assert!(same < found[i].len() / 2, "{dtype}: {same} of {} bytes are equal", found[i].len());
        }
    }
}

#[test]
fn parts_join() {
    for dtype in Dtype::ALL {
        let whole = bytes(3, dtype, "a");
        let filler = Filler::new(3, &TensorSpec { name: "a".into(), dtype, dims: vec![ROW, ROWS] });
        let mut parts = vec![0; whole.len()];
        let split = 77 * dtype.block_bytes();
        filler.fill(77, &mut parts[split..]);
        filler.fill(0, &mut parts[..split]);
        assert!(whole == parts, "{dtype}");
    }
}

#[test]
fn mean_and_deviation() {
    for dtype in Dtype::ALL {
        let mut weights = vec![0.0; ROW * ROWS];
        dequantise_row(dtype, &bytes(5, dtype, "a"), &mut weights);
        let n = weights.len() as f64;
        let mean = weights.iter().map(|&w| f64::from(w)).sum::<f64>() / n;
        let deviation = (weights.iter().map(|&w| f64::from(w).powi(2)).sum::<f64>() / n).sqrt();
        let want = 1.0 / (ROW as f64).sqrt();
        // 131072 draws: the mean's own deviation is want / 362. Steps rounded to f16 and types whose codes lie half a
        // step off zero add what is left.
        assert!(mean.abs() < want / 40.0, "{dtype}: mean {mean}, deviation {deviation}");
        // Steps vary by a quarter and scales over one octave, which the formula takes at its middle.
        assert!((deviation / want - 1.0).abs() < 0.1, "{dtype}: deviation {deviation}, {want} wanted");
    }
}

#[test]
fn norms_are_near_one() {
    let spec = TensorSpec { name: "n".into(), dtype: Dtype::F32, dims: vec![ROW] };
    let mut out = vec![0; 4 * ROW];
    Filler::new(1, &spec).fill(0, &mut out);
    let mut weights = vec![0.0; ROW];
    dequantise_row(Dtype::F32, &out, &mut weights);
    assert!(weights.iter().all(|w| (0.75..1.25).contains(w)), "{weights:?}");
}
