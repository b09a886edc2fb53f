//! The stages, one file each: which kernels a stage launches, on what, in what shape. The arithmetic is in
//! `kernels/<stage>.cu`.

pub(crate) mod decode;
pub(crate) mod attend;
pub(crate) mod bandwidth;
pub(crate) mod embed;
pub(crate) mod fixed;
pub(crate) mod group;
pub(crate) mod rope_store;
pub(crate) mod route;
pub(crate) mod sample;

#[cfg(test)]
mod tests;
