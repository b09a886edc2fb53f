//! The ordered map of metadata, and getters that say what they missed. Knows no key by name.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::{Array, Error, ErrorKind, Value};

/// Metadata in file order.
///
/// Every typed getter names the key, the type found and the type wanted when it fails. The `opt_` forms
/// return `None` where the key is absent; a key of the wrong type fails in either form.
#[derive(Clone, Debug, Default)]
pub struct Metadata {
    entries: Vec<(Arc<str>, Value)>,
    /// Key to place in `entries`. A tree, so that a hostile file of a million keys stays `n log n`.
    places: BTreeMap<Arc<str>, usize>,
}

impl PartialEq for Metadata {
    /// Same keys and values in the same order; as always, NaN equals nothing.
    fn eq(&self, other: &Self) -> bool {
        self.entries == other.entries
    }
}

impl Metadata {
    /// No entries.
    pub fn new() -> Self {
        Self::default()
    }

    /// How many entries there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The entries in file order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Value)> {
        self.entries.iter().map(|(key, value)| (&**key, value))
    }

    /// The value of `key`, whatever its type.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.places.get(key).map(|&place| &self.entries[place].1)
    }

    /// Sets `key`: in its place where it exists, else at the end. Returns the value replaced.
    pub fn set(&mut self, key: &str, value: impl Into<Value>) -> Option<Value> {
        let value = value.into();
        if let Some(&place) = self.places.get(key) {
            return Some(std::mem::replace(&mut self.entries[place].1, value));
        }
        let key: Arc<str> = key.into();
        self.places.insert(key.clone(), self.entries.len());
        self.entries.push((key, value));
        None
    }

    /// Drops the entries for whose key `keep` is false.
    pub fn retain(&mut self, mut keep: impl FnMut(&str) -> bool) {
        self.entries.retain(|(key, _)| keep(key));
        self.places = self.entries.iter().enumerate().map(|(place, (key, _))| (key.clone(), place)).collect();
    }

    /// Reads `key` with `read`, which returns `None` for a type that it does not take.
    fn read<'a, T>(
        &'a self,
        key: &str,
        wanted: &'static str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, Error> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match read(value) {
            Some(found) => Ok(Some(found)),
            None => Err(ErrorKind::WrongType { key: key.into(), found: value.type_name(), wanted }.into()),
        }
    }

    /// An integer of any stored width, if it fits `T`.
    pub(crate) fn integer<T: TryFrom<i128>>(
        &self,
        key: &str,
        wanted: &'static str,
    ) -> Result<Option<T>, Error> {
        let Some(value) = self.read(key, wanted, Value::as_integer)? else { return Ok(None) };
        match T::try_from(value) {
            Ok(value) => Ok(Some(value)),
            Err(_) => Err(ErrorKind::OutOfRange { key: key.into(), value, wanted }.into()),
        }
    }

    fn required<T>(key: &str, found: Option<T>) -> Result<T, Error> {
        found.ok_or_else(|| ErrorKind::MissingKey { key: key.into() }.into())
    }
}

/// Defines the required getter of each optional one.
macro_rules! required {
    ($($(#[$doc:meta])* $name:ident = $optional:ident -> $ty:ty;)*) => {
        impl Metadata {
            $($(#[$doc])*
            pub fn $name(&self, key: &str) -> Result<$ty, Error> {
                Self::required(key, self.$optional(key)?)
            })*
        }
    };
}

required! {
    /// A string.
    str = opt_str -> &str;
    /// An integer of any stored width that fits.
    u32 = opt_u32 -> u32;
    /// An integer of any stored width that fits.
    u64 = opt_u64 -> u64;
    /// An integer of any stored width that fits.
    i64 = opt_i64 -> i64;
    /// An integer of any stored width that fits: a length or a count.
    usize = opt_usize -> usize;
    /// A float of either width, rounded to nearest.
    f32 = opt_f32 -> f32;
    /// A boolean.
    bool = opt_bool -> bool;
    /// An array of any type.
    array = opt_array -> &Array;
    /// An array of strings.
    strings = opt_strings -> &[String];
    /// An array of `i32`.
    i32s = opt_i32s -> &[i32];
    /// An array of `u32`.
    u32s = opt_u32s -> &[u32];
    /// An array of `f32`.
    f32s = opt_f32s -> &[f32];
    /// An array of booleans.
    bools = opt_bools -> &[bool];
}

impl Metadata {
    /// A string, if present.
    pub fn opt_str(&self, key: &str) -> Result<Option<&str>, Error> {
        self.read(key, "string", |value| match value {
            Value::String(text) => Some(text.as_str()),
            _ => None,
        })
    }

    /// An integer of any stored width that fits, if present.
    pub fn opt_u32(&self, key: &str) -> Result<Option<u32>, Error> {
        self.integer(key, "u32")
    }

    /// An integer of any stored width that fits, if present.
    pub fn opt_u64(&self, key: &str) -> Result<Option<u64>, Error> {
        self.integer(key, "u64")
    }

    /// An integer of any stored width that fits, if present.
    pub fn opt_i64(&self, key: &str) -> Result<Option<i64>, Error> {
        self.integer(key, "i64")
    }

    /// An integer of any stored width that fits, if present: a length or a count.
    pub fn opt_usize(&self, key: &str) -> Result<Option<usize>, Error> {
        self.integer(key, "unsigned integer")
    }

    /// A float of either width, rounded to nearest, if present.
    pub fn opt_f32(&self, key: &str) -> Result<Option<f32>, Error> {
        self.read(key, "f32", |value| match *value {
            Value::F32(v) => Some(v),
            // Rounding is the point: every consumer works in f32, and a few producers store f64.
            Value::F64(v) => Some(v as f32),
            _ => None,
        })
    }

    /// A boolean, if present.
    pub fn opt_bool(&self, key: &str) -> Result<Option<bool>, Error> {
        self.read(key, "bool", |value| match *value {
            Value::Bool(v) => Some(v),
            _ => None,
        })
    }

    /// An array of any type, if present.
    pub fn opt_array(&self, key: &str) -> Result<Option<&Array>, Error> {
        self.read(key, "array", |value| match value {
            Value::Array(array) => Some(array),
            _ => None,
        })
    }

    /// An array of strings, if present.
    pub fn opt_strings(&self, key: &str) -> Result<Option<&[String]>, Error> {
        self.read(key, "array of string", |value| match value {
            Value::Array(Array::String(items)) => Some(items.as_slice()),
            _ => None,
        })
    }

    /// An array of `i32`, if present.
    pub fn opt_i32s(&self, key: &str) -> Result<Option<&[i32]>, Error> {
        self.read(key, "array of i32", |value| match value {
            Value::Array(Array::I32(items)) => Some(items.as_slice()),
            _ => None,
        })
    }

    /// An array of `u32`, if present.
    pub fn opt_u32s(&self, key: &str) -> Result<Option<&[u32]>, Error> {
        self.read(key, "array of u32", |value| match value {
            Value::Array(Array::U32(items)) => Some(items.as_slice()),
            _ => None,
        })
    }

    /// An array of `f32`, if present.
    pub fn opt_f32s(&self, key: &str) -> Result<Option<&[f32]>, Error> {
        self.read(key, "array of f32", |value| match value {
            Value::Array(Array::F32(items)) => Some(items.as_slice()),
            _ => None,
        })
    }

    /// An array of booleans, if present.
    pub fn opt_bools(&self, key: &str) -> Result<Option<&[bool]>, Error> {
        self.read(key, "array of bool", |value| match value {
            Value::Array(Array::Bool(items)) => Some(items.as_slice()),
            _ => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::Debug;

    use super::*;

    fn sample() -> Metadata {
        let mut metadata = Metadata::new();
        metadata.set("text", "qwen3");
        metadata.set("small", 7u8);
        metadata.set("negative", -1i32);
        metadata.set("large", 1u64 << 32);
        metadata.set("half", 0.5f32);
        metadata.set("double", 1e6f64);
        metadata.set("yes", true);
        metadata.set("names", vec!["a".to_owned(), "b".to_owned()]);
        metadata.set("kinds", vec![1i32, 3]);
        metadata
    }

    #[test]
    fn typed_getters() {
        #[track_caller]
        fn check<T: PartialEq + Debug>(found: Result<T, Error>, expected: Result<T, &str>) {
            assert_eq!(found.map_err(|error| error.to_string()), expected.map_err(str::to_owned));
        }
        let metadata = sample();
        check(metadata.str("text"), Ok("qwen3"));
        check(metadata.str("small"), Err(r#"metadata key "small" is u8, expected string"#));
        check(metadata.str("nowhere"), Err(r#"metadata key "nowhere" is missing"#));
        check(metadata.opt_str("nowhere"), Ok(None));
        check(metadata.opt_str("small"), Err(r#"metadata key "small" is u8, expected string"#));

        check(metadata.u32("small"), Ok(7));
        check(metadata.i64("negative"), Ok(-1));
        check(metadata.u32("negative"), Err(r#"metadata key "negative" is -1, which does not fit u32"#));
        check(metadata.u32("large"), Err(r#"metadata key "large" is 4294967296, which does not fit u32"#));
        check(metadata.u64("large"), Ok(1 << 32));
        check(metadata.usize("half"), Err(r#"metadata key "half" is f32, expected unsigned integer"#));
        check(metadata.opt_usize("nowhere"), Ok(None));

        check(metadata.f32("half"), Ok(0.5));
        check(metadata.f32("double"), Ok(1e6));
        check(metadata.f32("small"), Err(r#"metadata key "small" is u8, expected f32"#));
        check(metadata.bool("yes"), Ok(true));
        check(metadata.opt_bool("names"), Err(r#"metadata key "names" is array of string, expected bool"#));

        check(metadata.strings("names").map(<[String]>::len), Ok(2));
        check(metadata.i32s("kinds"), Ok(&[1, 3][..]));
        check(metadata.u32s("kinds"), Err(r#"metadata key "kinds" is array of i32, expected array of u32"#));
        check(
            metadata.f32s("names"),
            Err(r#"metadata key "names" is array of string, expected array of f32"#),
        );
        check(metadata.bools("yes"), Err(r#"metadata key "yes" is bool, expected array of bool"#));
        check(metadata.array("kinds").map(Array::len), Ok(2));
    }

    #[test]
    fn order_is_kept() {
        fn keys(metadata: &Metadata) -> Vec<&str> {
            metadata.iter().map(|(key, _)| key).collect()
        }
        let mut metadata = sample();
        assert_eq!(metadata.set("small", 8u8), Some(Value::U8(7)));
        assert_eq!(keys(&metadata)[..3], ["text", "small", "negative"]);
        metadata.retain(|key| key != "text");
        assert_eq!(keys(&metadata)[..3], ["small", "negative", "large"]);
        assert_eq!((metadata.get("text"), metadata.u32("small").unwrap()), (None, 8));
        assert_eq!(metadata.set("text", "last"), None);
        assert_eq!(keys(&metadata).last(), Some(&"text"));
    }
}
