use gguf::Dtype;
use quant::*;
fn main() {
    let a: Vec<String> = std::env::args().collect();
    let d: Dtype = a[1].parse().unwrap();
    let k: usize = a[2].parse().unwrap();
    let raw = std::fs::read(&a[3]).unwrap();
    let x: Vec<f32> = raw.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    let mut out = Vec::new();
    let t = std::time::Instant::now();
    for r in x.chunks_exact(k) {
        let mut o = vec![0u8; d.row_bytes(k).unwrap()];
        quantise_row(d, r, &mut o).unwrap();
        out.extend(o);
    }
    eprintln!("{d} {:.1} Mw/s", x.len() as f64 / 1e6 / t.elapsed().as_secs_f64());
    std::fs::write(&a[4], out).unwrap();
}
