//! Block-quantised tensor types: layout, dequantise, quantise, fixed-point activation rows.
