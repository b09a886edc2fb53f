//! Dequantisation against the `gguf` Python package, bit for bit, and against the documented formulas.

use gguf::Dtype;
use quant::dequantise_row;

/// Made by tools/fixtures/dequant.py, which says how it is laid out.
const FIXTURE: &[u8] = include_bytes!("data/dequant.bin");

/// One record of the fixture.
struct Record {
    dtype: Dtype,
    bytes: Vec<u8>,
    want: Vec<f32>,
}

fn records() -> Vec<Record> {
    let mut rest = FIXTURE;
    let mut take = |n: usize| rest.split_off(..n).expect("a whole fixture");
    let mut records = Vec::new();
    for _ in Dtype::ALL {
        let len = take(1)[0];
        let name = str::from_utf8(take(len.into())).expect("an ASCII name");
        let dtype: Dtype = name.parse().expect("a supported type");
        let mut u32 = || u32::from_le_bytes(take(4).try_into().expect("4 bytes")) as usize;
        let (blocks, weights) = (u32(), u32());
        let bytes = take(blocks * dtype.block_bytes()).to_vec();
        let want = take(weights * 4).as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect();
        records.push(Record { dtype, bytes, want });
    }
    assert!(rest.is_empty(), "the fixture has a record for each type and no more");
    records
}

#[test]
fn equals_gguf_python_in_every_bit() {
    let mut seen = Vec::new();
    for Record { dtype, bytes, want } in records() {
        let mut got = vec![0.0; want.len()];
        dequantise_row(dtype, &bytes, &mut got);
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            // Which NaN an invalid operation makes is up to the processor.
            let same = got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan();
            assert!(same, "{dtype} weight {i} (block {}): {got:e} for {want:e}", i / dtype.block_len());
        }
        seen.push(dtype);
    }
    assert_eq!(seen, Dtype::ALL);
}
