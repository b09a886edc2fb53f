//! The f64 backend: weights dequantised, slow and obviously right.
