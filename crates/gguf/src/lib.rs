//! Reading and writing GGUF model files; trusts nothing it reads.
