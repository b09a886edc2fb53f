//! The CPU backend: scalar truth, AVX2, AVX-512.
