//! The stages, one file each: which kernels a stage launches, on what, in what shape. The arithmetic is in
//! `kernels/<stage>.cu`.

pub(crate) mod adjust;
pub(crate) mod attend;
pub(crate) mod attn_out;
pub(crate) mod bandwidth;
pub(crate) mod decode;
pub(crate) mod embed;
pub(crate) mod experts_down;
pub(crate) mod experts_up;
pub(crate) mod ffn;
pub(crate) mod fixed;
pub(crate) mod group;
pub(crate) mod head;
pub(crate) mod observe;
pub(crate) mod product;
pub(crate) mod product_many;
pub(crate) mod qkv;
pub(crate) mod rope_store;
pub(crate) mod route;
pub(crate) mod sample;
pub(crate) mod stream;

#[cfg(test)]
mod tests;
