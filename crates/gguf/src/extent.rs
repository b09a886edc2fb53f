//! What a tensor's shape and a file's alignment may be, and the bytes that follow from them: the arithmetic
//! that hostile files aim at, in one place for reader and writer.

use crate::{DEFAULT_ALIGNMENT, Dtype, Error, ErrorKind, Metadata};

/// The ranks that the format allows (`GGML_MAX_DIMS`).
pub(crate) const MAX_RANK: usize = 4;

/// Checks `dims` (GGUF order, `dims[0]` the row length) and returns them with the tensor's size in bytes.
///
/// The product of all dimensions fits a `usize` as well, which the size in bytes alone would not imply: a
/// block has fewer bytes than elements.
pub(crate) fn tensor_extent(name: &str, dtype: Dtype, dims: &[u64]) -> Result<(Vec<usize>, u64), Error> {
    if dims.is_empty() || dims.len() > MAX_RANK {
        return Err(ErrorKind::Rank { tensor: name.to_owned(), rank: dims.len() }.into());
    }
    if dims.contains(&0) {
        return Err(ErrorKind::ZeroDimension { tensor: name.to_owned(), dims: dims.to_vec() }.into());
    }
    let too_large = || ErrorKind::TensorSize { tensor: name.to_owned(), dtype, dims: dims.to_vec() };
    let sizes: Vec<usize> = dims
        .iter()
        .map(|&dim| usize::try_from(dim).map_err(|_| too_large().into()))
        .collect::<Result<_, Error>>()?;
    if !sizes[0].is_multiple_of(dtype.block_len()) {
        return Err(ErrorKind::RowLength { tensor: name.to_owned(), dtype, row_len: dims[0] }.into());
    }
    let bytes = (|| {
        sizes.iter().try_fold(1usize, |elements, &dim| elements.checked_mul(dim))?;
        let rows = sizes[1..].iter().try_fold(1usize, |rows, &dim| rows.checked_mul(dim))?;
        u64::try_from(dtype.row_bytes(sizes[0])?.checked_mul(rows)?).ok()
    })();
    Ok((sizes, bytes.ok_or_else(too_large)?))
}

/// The alignment of tensor data in bytes: `general.alignment`, a power of two.
pub(crate) fn alignment(metadata: &Metadata) -> Result<u64, Error> {
    let alignment = metadata.opt_u64("general.alignment")?.unwrap_or(DEFAULT_ALIGNMENT);
    if !alignment.is_power_of_two() {
        return Err(ErrorKind::Alignment { alignment }.into());
    }
    Ok(alignment)
}
