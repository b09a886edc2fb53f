//! Tensor element types: their ids in the file, names and block sizes. Knows nothing of what a block means.

use std::fmt;
use std::str::FromStr;

/// How a tensor's elements are stored. Quantised types store blocks of [`block_len`](Dtype::block_len)
/// consecutive elements of a row in [`block_bytes`](Dtype::block_bytes) bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Dtype {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// The upper half of a binary32.
    BF16,
    /// 32 signed bytes and an f16 scale.
    Q8_0,
    /// 32 nibbles and an f16 scale.
    Q4_0,
    /// 32 nibbles, an f16 scale and an f16 minimum.
    Q4_1,
    /// 32 five-bit integers and an f16 scale.
    Q5_0,
    /// 32 five-bit integers, an f16 scale and an f16 minimum.
    Q5_1,
    /// 256 two-bit integers; 16 sub-blocks with four-bit scales and minima.
    Q2K,
    /// 256 three-bit integers; 16 sub-blocks with six-bit scales.
    Q3K,
    /// 256 nibbles; 8 sub-blocks with six-bit scales and minima.
    Q4K,
    /// 256 five-bit integers; 8 sub-blocks with six-bit scales and minima.
    Q5K,
    /// 256 six-bit integers; 16 sub-blocks with eight-bit scales.
    Q6K,
}

impl Dtype {
    /// Every supported type, in the order in which they are listed to users.
    pub const ALL: [Dtype; 13] = [
        Dtype::F32,
        Dtype::F16,
        Dtype::BF16,
        Dtype::Q8_0,
        Dtype::Q4_0,
        Dtype::Q4_1,
        Dtype::Q5_0,
        Dtype::Q5_1,
        Dtype::Q2K,
        Dtype::Q3K,
        Dtype::Q4K,
        Dtype::Q5K,
        Dtype::Q6K,
    ];

    /// The type with this `ggml_type` number in the file, if supported.
    pub fn from_id(id: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|dtype| dtype.id() == id)
    }

    /// The `ggml_type` number in the file.
    pub const fn id(self) -> u32 {
        match self {
            Dtype::F32 => 0,
            Dtype::F16 => 1,
            Dtype::Q4_0 => 2,
            Dtype::Q4_1 => 3,
            Dtype::Q5_0 => 6,
            Dtype::Q5_1 => 7,
            Dtype::Q8_0 => 8,
            Dtype::Q2K => 10,
            Dtype::Q3K => 11,
            Dtype::Q4K => 12,
            Dtype::Q5K => 13,
            Dtype::Q6K => 14,
            Dtype::BF16 => 30,
        }
    }

    /// The name as the field writes it, such as `Q4_K`.
    pub const fn name(self) -> &'static str {
        match self {
            Dtype::F32 => "F32",
            Dtype::F16 => "F16",
            Dtype::BF16 => "BF16",
            Dtype::Q8_0 => "Q8_0",
            Dtype::Q4_0 => "Q4_0",
            Dtype::Q4_1 => "Q4_1",
            Dtype::Q5_0 => "Q5_0",
            Dtype::Q5_1 => "Q5_1",
            Dtype::Q2K => "Q2_K",
            Dtype::Q3K => "Q3_K",
            Dtype::Q4K => "Q4_K",
            Dtype::Q5K => "Q5_K",
            Dtype::Q6K => "Q6_K",
        }
    }

    /// Elements in a block.
    pub const fn block_len(self) -> usize {
        match self {
            Dtype::F32 | Dtype::F16 | Dtype::BF16 => 1,
            Dtype::Q8_0 | Dtype::Q4_0 | Dtype::Q4_1 | Dtype::Q5_0 | Dtype::Q5_1 => 32,
            Dtype::Q2K | Dtype::Q3K | Dtype::Q4K | Dtype::Q5K | Dtype::Q6K => 256,
        }
    }

    /// Bytes in a block: `f16` scales first, then scales, high bits and low bits of its elements.
    pub const fn block_bytes(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::BF16 => 2,
            Dtype::Q8_0 => 2 + 32,
            Dtype::Q4_0 => 2 + 16,
            Dtype::Q4_1 => 4 + 16,
            Dtype::Q5_0 => 2 + 4 + 16,
            Dtype::Q5_1 => 4 + 4 + 16,
            Dtype::Q2K => 4 + 16 + 64,
            Dtype::Q3K => 2 + 12 + 32 + 64,
            Dtype::Q4K => 4 + 12 + 128,
            Dtype::Q5K => 4 + 12 + 32 + 128,
            Dtype::Q6K => 2 + 16 + 64 + 128,
        }
    }

    /// Bytes in a row of `k` elements, or `None` where `k` is no multiple of the block or the size overflows.
    pub const fn row_bytes(self, k: usize) -> Option<usize> {
        if !k.is_multiple_of(self.block_len()) {
            return None;
        }
        (k / self.block_len()).checked_mul(self.block_bytes())
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A name that is no supported [`Dtype`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown tensor type `{0}`; supported are {list}", list = supported())]
pub struct UnknownDtype(pub String);

impl FromStr for Dtype {
    type Err = UnknownDtype;

    /// Case is ignored, and so is the underscore: `q4_k` and `Q4K` are both [`Dtype::Q4K`].
    fn from_str(name: &str) -> Result<Self, UnknownDtype> {
        let plain = |name: &str| name.replace('_', "").to_ascii_uppercase();
        Self::ALL
            .into_iter()
            .find(|dtype| plain(dtype.name()) == plain(name))
            .ok_or_else(|| UnknownDtype(name.to_owned()))
    }
}

/// The supported types as a list for error messages.
pub(crate) fn supported() -> String {
    Dtype::ALL.map(Dtype::name).join(", ")
}

/// What other producers call a `ggml_type` that is not supported here, so that an error can say it by name.
///
/// Source: `enum ggml_type` in ggml.h; numbers retired there keep the name that they had.
pub(crate) fn foreign_name(id: u32) -> String {
    let name = match id {
        4 => "Q4_2",
        5 => "Q4_3",
        9 => "Q8_1",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        31 => "Q4_0_4_4",
        32 => "Q4_0_4_8",
        33 => "Q4_0_8_8",
        34 => "TQ1_0",
        35 => "TQ2_0",
        36 => "IQ4_NL_4_4",
        37 => "IQ4_NL_4_8",
        38 => "IQ4_NL_8_8",
        39 => "MXFP4",
        40 => "NVFP4",
        41 => "Q1_0",
        _ => return format!("{id}, which is not known"),
    };
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Number, elements and bytes of a block as llama.cpp's `ggml.h` and the `gguf` Python package
    /// (`GGML_QUANT_SIZES`) have them.
    #[test]
    fn table_of_types() {
        #[track_caller]
        fn check(name: &str, id: u32, block_len: usize, block_bytes: usize) {
            let dtype: Dtype = name.parse().unwrap();
            assert_eq!(Dtype::from_id(id), Some(dtype), "{name}");
            assert_eq!((dtype.id(), dtype.name()), (id, name));
            assert_eq!((dtype.block_len(), dtype.block_bytes()), (block_len, block_bytes), "{name}");
            assert_eq!(dtype.row_bytes(3 * block_len), Some(3 * block_bytes), "{name}");
            assert_eq!(dtype.row_bytes(3 * block_len + 1).is_some(), block_len == 1, "{name}");
        }
        check("F32", 0, 1, 4);
        check("F16", 1, 1, 2);
        check("Q4_0", 2, 32, 18);
        check("Q4_1", 3, 32, 20);
        check("Q5_0", 6, 32, 22);
        check("Q5_1", 7, 32, 24);
        check("Q8_0", 8, 32, 34);
        check("Q2_K", 10, 256, 84);
        check("Q3_K", 11, 256, 110);
        check("Q4_K", 12, 256, 144);
        check("Q5_K", 13, 256, 176);
        check("Q6_K", 14, 256, 210);
        check("BF16", 30, 1, 2);
        assert_eq!(Dtype::F32.row_bytes(usize::MAX / 2), None);
    }

    #[test]
    fn names_are_read_as_people_write_them() {
        for name in ["Q4_K", "q4_k", "Q4K", "q4k"] {
            assert_eq!(name.parse(), Ok(Dtype::Q4K), "{name}");
        }
        let error = "Q4_K_M".parse::<Dtype>().unwrap_err().to_string();
        assert!(error.starts_with("unknown tensor type `Q4_K_M`; supported are F32, F16, "), "{error}");
    }

    #[test]
    fn no_number_has_two_meanings() {
        for dtype in Dtype::ALL {
            assert!(foreign_name(dtype.id()).ends_with("not known"), "{dtype}");
        }
        assert_eq!(foreign_name(34), "TQ1_0");
    }
}
