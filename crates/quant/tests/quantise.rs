//! Quantising: the error that a type's step predicts, extreme rows, and bytes that are the same everywhere.

use gguf::Dtype::{self, *};
use quant::quantise::NonFinite;
use quant::{dequantise_row, quantise_row};

/// Deterministic test values: splitmix64 and the sums and quotients of uniform numbers, no libm.
struct Rng(u64);

impl Rng {
    fn uniform(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 40) as f32 / (1u32 << 24) as f32
    }

    /// Nearly Gaussian with variance 1: the sum of twelve uniform numbers.
    fn gaussian(&mut self) -> f32 {
        (0..12).map(|_| self.uniform()).sum::<f32>() - 6.0
    }

    /// Student's t with four degrees of freedom, nearly: one value in 200 is beyond 4.6 deviations.
    fn heavy_tailed(&mut self) -> f32 {
        let chi2: f32 = (0..4).map(|_| self.gaussian()).map(|x| x * x).sum();
        self.gaussian() / (chi2 / 4.0 + 1e-3).sqrt()
    }
}

fn row(draw: fn(&mut Rng) -> f32, len: usize) -> Vec<f32> {
    let mut rng = Rng(2024);
    (0..len).map(|_| 0.02 * draw(&mut rng)).collect()
}

fn quantise(dtype: Dtype, x: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0xAA; dtype.row_bytes(x.len()).expect("whole blocks")];
    quantise_row(dtype, x, &mut bytes).expect("a finite row");
    bytes
}

/// What is left of `x` after quantising.
fn round_trip(dtype: Dtype, x: &[f32]) -> Vec<f32> {
    let mut out = vec![f32::NAN; x.len()];
    dequantise_row(dtype, &quantise(dtype, x), &mut out);
    out
}

fn relative_rmse(x: &[f32], got: &[f32]) -> f64 {
    let square = |x: f32| f64::from(x) * f64::from(x);
    let error: f64 = x.iter().zip(got).map(|(x, got)| square(x - got)).sum();
    (error / x.iter().map(|&x| square(x)).sum::<f64>()).sqrt()
}

/// The relative RMSE of rounding uniformly in each sub-block of `len`, with the step that maps its range onto the
/// codes: a step of `h` has a mean square error of `h^2 / 12`.
fn predicted(dtype: Dtype, x: &[f32]) -> f64 {
    let (len, steps, minimum) = match dtype {
        Q8_0 => (32, 127.0, false),
        Q4_0 => (32, 8.0, false),
        Q5_0 => (32, 16.0, false),
        Q4_1 => (32, 15.0, true),
        Q5_1 => (32, 31.0, true),
        Q2K => (16, 3.0, true),
        Q3K => (16, 4.0, false),
        Q4K => (32, 15.0, true),
        Q5K => (32, 31.0, true),
        Q6K => (16, 32.0, false),
        _ => unreachable!("{dtype} has no step"),
    };
    let mut error = 0.0;
    for x in x.chunks_exact(len) {
        let low = x.iter().copied().fold(f32::INFINITY, f32::min);
        let high = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let range = if minimum { high - low } else { high.max(-low) };
        error += len as f64 * (f64::from(range) / steps).powi(2) / 12.0;
    }
    (error / x.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>()).sqrt()
}

#[test]
fn error_is_below_what_the_step_predicts() {
    // Plain rounding attains the prediction, as Q8_0 does. Choosing a scale gains 5% of it, and a minimum too 12%,
    // rounding both included; a percent or two and more is left for other rows.
    let mut report = String::new();
    for (name, draw) in
        [("Gaussian", Rng::gaussian as fn(&mut Rng) -> f32), ("heavy-tailed", Rng::heavy_tailed)]
    {
        let x = row(draw, 64 * 1024);
        for dtype in [Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2K, Q3K, Q4K, Q5K, Q6K] {
            let (got, bound) = (relative_rmse(&x, &round_trip(dtype, &x)), predicted(dtype, &x));
            report += &format!("{name} {dtype}: {got:.5}, predicted {bound:.5}, ratio {:.3}\n", got / bound);
            let attained = match dtype {
                Q8_0 => 1.0,
                Q4_0 | Q5_0 | Q3K | Q6K => 0.96,
                _ => 0.91,
            };
            assert!(got < attained * bound, "{report}");
            assert!(got > 0.5 * bound, "too good to be true\n{report}");
        }
    }
    println!("{report}");
}

#[test]
fn q8_0_equals_gguf_python_in_every_byte() {
    // Made by tools/fixtures/dequant.py: 64 blocks, as f32 and as what `gguf.quants.quantize` makes of them.
    let fixture = include_bytes!("data/q8_0.bin");
    let (x, want) = fixture.split_at(64 * 32 * 4);
    let x: Vec<f32> = x.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect();
    for (i, (got, want)) in quantise(Q8_0, &x).chunks(34).zip(want.chunks(34)).enumerate() {
        assert_eq!(got, want, "block {i}");
    }
}

#[test]
fn extreme_rows() {
    /// Asserts that every weight comes back within `relative` of the row's largest magnitude.
    fn check(what: &str, x: &[f32], relative: f32) {
        let largest = x.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
        for dtype in Dtype::ALL {
            for (i, (x, got)) in x.iter().zip(round_trip(dtype, x)).enumerate() {
                assert!(
                    (x - got).abs() <= relative * largest,
                    "{what}, {dtype}: weight {i} is {got:e} for {x:e}"
                );
            }
        }
    }
    let constant = |value: f32| vec![value; 512];
    check("zeros", &constant(0.0), 0.0);
    check("negative zeros", &constant(-0.0), 0.0);
    for value in [1.0, -1.0, 0.3, -0.3, 1e-3, -7e3] {
        // Two roundings to f16 at most, or one to bfloat16.
        check("constant", &constant(value), 1.0 / 256.0);
    }
    // Below what an f16 scale can tell from zero, the block may be zero but no worse.
    for value in [1e-5, -3e-6, 1e-7, 1e-8, 1e-30, f32::from_bits(1)] {
        check("tiny", &constant(value), 1.0);
    }
    // Steps that are subnormal in f16 must still reach the largest value: a grid of 2^-24 for values of 1e-4.
    let small: Vec<f32> = row(Rng::gaussian, 512).iter().map(|x| x * 0.005).collect();
    check("subnormal steps", &small, 0.25);
    // Larger than any scale in f16: saturated, with the right sign.
    for value in [3e38, -3e38, 1e9] {
        check("huge", &constant(value), 1.0);
        for dtype in Dtype::ALL {
            let got = round_trip(dtype, &constant(value))[77];
            assert!(got.is_finite() && got.signum() == value.signum(), "{dtype}: {got:e} for {value:e}");
        }
    }
    let mut spike = row(Rng::gaussian, 512);
    spike[300] = -50.0;
    check("spike", &spike, 0.15);
}

#[test]
fn a_row_that_is_not_finite_is_refused() {
    for (index, value) in [(0, f32::INFINITY), (255, f32::NEG_INFINITY), (300, f32::INFINITY)] {
        let mut x = row(Rng::gaussian, 512);
        x[index] = value;
        x[511] = f32::NAN;
        for dtype in Dtype::ALL {
            let mut out = vec![0xAA; dtype.row_bytes(512).expect("whole blocks")];
            assert_eq!(quantise_row(dtype, &x, &mut out), Err(NonFinite { index, value }), "{dtype}");
            assert!(out.iter().all(|&byte| byte == 0xAA), "{dtype}: the output is untouched");
        }
    }
    let error = NonFinite { index: 7, value: f32::NAN }.to_string();
    assert_eq!(error, "element 7 of the row is NaN; only finite numbers can be quantised");
}

#[test]
fn blocks_do_not_depend_on_their_neighbours() {
    let x = row(Rng::heavy_tailed, 4 * 256);
    for dtype in Dtype::ALL {
        let parts: Vec<u8> = x.chunks(256).flat_map(|x| quantise(dtype, x)).collect();
        assert_eq!(quantise(dtype, &x), parts, "{dtype}");
    }
}

#[test]
fn the_same_bytes_on_every_machine() {
    // FNV-1a of 32 quantised rows. These change when the search changes, and must not otherwise.
    let want = [
        (Q8_0, 0x1B2B_9B14_AF46_2D1B),
        (Q4_0, 0x991E_7ADB_A90E_19DB),
        (Q4_1, 0x988A_DF41_E848_D9A1),
        (Q5_0, 0xD398_47DF_517C_DB70),
        (Q5_1, 0x1478_0E5A_024B_8C33),
        (Q2K, 0x2ACC_9144_3ADB_05C4),
        (Q3K, 0xC858_B85A_74D2_8D77),
        (Q4K, 0x1103_6A2B_42D7_C6D3),
        (Q5K, 0xD62E_41D2_2150_D7AB),
        (Q6K, 0xFD39_8D19_3248_0435),
    ];
    let x = row(Rng::heavy_tailed, 32 * 1024);
    let fnv = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01B3);
    let got = want.map(|(dtype, _)| (dtype, quantise(dtype, &x).iter().fold(0xCBF2_9CE4_8422_2325, fnv)));
    assert_eq!(got, want, "got {got:X?}");
}
