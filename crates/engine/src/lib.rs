//! Tokens in, tokens out: tokenizer, chat template, sampler, KV blocks, generation.
