//! Metadata values and shapes as text and JSON, long ones shortened. Knows no key.

use std::io::{self, Write};

use gguf::{Array, Metadata, Value};
use serde_json::json;

use crate::output;

/// Elements of an array that are shown where it is shortened.
const SHOWN: usize = 5;
/// Arrays up to this length and strings up to so many characters are shown whole.
const SHORT_ARRAY: usize = 16;
const SHORT_STRING: usize = 72;

/// A shape in the file's order, the row length first.
pub(super) fn shape(dims: &[usize]) -> String {
    dims.iter().map(usize::to_string).collect::<Vec<_>>().join(" x ")
}

/// Writes the section of metadata, one line a key.
pub(super) fn write_metadata(metadata: &Metadata, full: bool, out: &mut impl Write) -> io::Result<()> {
    writeln!(out, "\nMetadata ({} keys)", metadata.len())?;
    let width = metadata.iter().map(|(key, _)| key.chars().count()).max().unwrap_or(0).min(48);
    for (key, value) in metadata.iter() {
        writeln!(out, "  {:<width$}  {}", output::printable(key), describe(value, full))?;
    }
    Ok(())
}

/// Every key, in the order of the file; a shortened array becomes an object that says so.
pub(super) fn metadata_json(metadata: &Metadata, full: bool) -> serde_json::Value {
    let entry = |(key, value): (&str, &Value)| {
        let shown = match value {
            Value::Array(array) if !full && array.len() > SHORT_ARRAY => {
                json!({ "array_of": array.element_type().name(), "length": array.len(),
                        "first": elements_json(array, SHOWN) })
            }
            Value::Array(array) => elements_json(array, usize::MAX),
            scalar => scalar_json(scalar),
        };
        (key.to_owned(), shown)
    };
    serde_json::Value::Object(metadata.iter().map(entry).collect())
}

fn describe(value: &Value, full: bool) -> String {
    match value {
        Value::String(text) => string(text, full),
        Value::Array(array) => {
            let whole = full || array.len() <= SHORT_ARRAY;
            let items = elements(array, if whole { usize::MAX } else { SHOWN }, full);
            let dots = if whole { "" } else { ", ..." };
            format!(
                "{} of {}: [{}{dots}]",
                output::grouped(array.len() as u64),
                array.element_type(),
                items.join(", ")
            )
        }
        scalar => scalar_text(scalar),
    }
}

fn string(text: &str, full: bool) -> String {
    match text.char_indices().nth(SHORT_STRING) {
        Some((end, _)) if !full => {
            format!("{:?}... ({} characters)", &text[..end], output::grouped(text.chars().count() as u64))
        }
        _ => format!("{text:?}"),
    }
}

/// Evaluates `$body` with `$items` bound to the elements of an array of numbers, and `$text` with the strings.
macro_rules! each_type {
    ($array:expr, $items:ident => $numbers:expr, $texts:expr) => {
        match $array {
            Array::U8($items) => $numbers,
            Array::I8($items) => $numbers,
            Array::U16($items) => $numbers,
            Array::I16($items) => $numbers,
            Array::U32($items) => $numbers,
            Array::I32($items) => $numbers,
            Array::U64($items) => $numbers,
            Array::I64($items) => $numbers,
            Array::F32($items) => $numbers,
            Array::F64($items) => $numbers,
            Array::Bool($items) => $numbers,
            Array::String($items) => $texts,
        }
    };
}

fn elements(array: &Array, most: usize, full: bool) -> Vec<String> {
    each_type!(array, items => items.iter().take(most).map(|item| item.to_string()).collect(),
               items.iter().take(most).map(|item| string(item, full)).collect())
}

fn elements_json(array: &Array, most: usize) -> serde_json::Value {
    each_type!(array, items => json!(items.iter().take(most).collect::<Vec<_>>()),
               json!(items.iter().take(most).collect::<Vec<_>>()))
}

/// Evaluates `$body` with `$item` bound to whatever a scalar holds.
macro_rules! scalar {
    ($value:expr, $item:ident => $body:expr) => {
        match $value {
            Value::U8($item) => $body,
            Value::I8($item) => $body,
            Value::U16($item) => $body,
            Value::I16($item) => $body,
            Value::U32($item) => $body,
            Value::I32($item) => $body,
            Value::U64($item) => $body,
            Value::I64($item) => $body,
            Value::F32($item) => $body,
            Value::F64($item) => $body,
            Value::Bool($item) => $body,
            Value::String($item) => $body,
            Value::Array(_) => unreachable!("arrays are told apart before"),
        }
    };
}

fn scalar_text(value: &Value) -> String {
    scalar!(value, item => item.to_string())
}

/// NaN and infinities, which JSON does not have, become null.
fn scalar_json(value: &Value) -> serde_json::Value {
    scalar!(value, item => json!(item))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_as_text() {
        let check = |value: Value, full, want: &str| assert_eq!(describe(&value, full), want);
        check(Value::U32(7), false, "7");
        check(Value::F32(1e-6), false, "0.000001");
        check(Value::Bool(true), false, "true");
        check("a\n\u{1b}[31m".into(), false, r#""a\n\u{1b}[31m""#);
        check("x".repeat(73).as_str().into(), false, &format!("\"{}\"... (73 characters)", "x".repeat(72)));
        check("x".repeat(73).as_str().into(), true, &format!("\"{}\"", "x".repeat(73)));
        check(vec![1u8, 2].into(), false, "2 of u8: [1, 2]");
        check((0..1000).collect::<Vec<i32>>().into(), false, "1,000 of i32: [0, 1, 2, 3, 4, ...]");
        check(vec!["a\"".to_owned()].into(), false, r#"1 of string: ["a\""]"#);
    }
}
