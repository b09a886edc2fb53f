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
