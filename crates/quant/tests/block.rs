//! Opening and closing blocks of any bytes, and the documented formulas against what dequantising computes.

use gguf::Dtype;
use proptest::prelude::*;
use quant::{SmallBlock, SuperBlock, close_small, close_super, dequantise_row, open_small, open_super};

/// One block of a quantised type, opened: what each weight's formula is made of, in f64.
struct Opened {
    /// `(product, addend)` of each weight: exact, for f64 holds every product of an f16 and two small integers.
    terms: Vec<(f64, f64)>,
    closed: Vec<u8>,
}

fn open(dtype: Dtype, bytes: &[u8]) -> Opened {
    let mut closed = vec![0xAA; bytes.len()];
    let terms = if dtype.block_len() == 256 {
        let mut open = SuperBlock::default();
        open_super(dtype, bytes, &mut open);
        close_super(dtype, &open, &mut closed);
        let weight = |(i, &code): (usize, &u8)| {
            let product = f64::from(open.scale[i / 16]) * (f64::from(code) - f64::from(open.bias));
            (f64::from(open.d) * product, -f64::from(open.dmin) * f64::from(open.min[i / 16]))
        };
        open.codes.iter().enumerate().map(weight).collect()
    } else {
        let mut open = SmallBlock::default();
        open_small(dtype, bytes, &mut open);
        close_small(dtype, &open, &mut closed);
        open.codes.iter().map(|&code| (f64::from(open.d) * f64::from(code), f64::from(open.m))).collect()
    };
    Opened { terms, closed }
}

/// A block type and any bytes that fill a block of it.
fn any_block() -> impl Strategy<Value = (Dtype, Vec<u8>)> {
    let types: Vec<Dtype> = Dtype::ALL.into_iter().filter(|dtype| dtype.block_len() > 1).collect();
    prop::sample::select(types)
        .prop_flat_map(|dtype| (Just(dtype), prop::collection::vec(any::<u8>(), dtype.block_bytes())))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes_open_dequantise_and_close((dtype, bytes) in any_block()) {
        let Opened { terms, closed } = open(dtype, &bytes);
        let mut weights = vec![0.0; dtype.block_len()];
        dequantise_row(dtype, &bytes, &mut weights);
        if terms.iter().any(|(product, addend)| !product.is_finite() || !addend.is_finite()) {
            return Ok(()); // a scale that is not finite: NaN payloads may change on the way
        }
        prop_assert_eq!(closed, bytes, "{} closed again", dtype);
        for (i, (&(product, addend), got)) in terms.iter().zip(weights).enumerate() {
            // d * scale, that times the code, dmin * min and their difference are each rounded to 24 bits: at most
            // two half units on the product, one on the addend, one on the result.
            let bound = (3.0 * product.abs() + 2.0 * addend.abs()) * f64::from(f32::EPSILON) / 2.0;
            let want = product + addend;
            prop_assert!((f64::from(got) - want).abs() <= bound, "{} weight {}: {:e} for {:e}", dtype, i, got, want);
        }
    }
}
