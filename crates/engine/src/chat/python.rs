//! What Python's Jinja does and minijinja does not: how values are written, and a few methods and tests. Knows
//! nothing of messages.

use std::borrow::Cow;

use minijinja::value::{Value, ValueKind, from_args};
use minijinja::{Error, ErrorKind, Output, State};

/// How deep a value may be nested that is written; serde_json reads no deeper either.
pub(super) const MAX_DEPTH: usize = 128;

/// Methods of Python's types on values: minijinja-contrib's, and two that it lacks.
pub(super) fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    match (value.as_str(), name) {
        (Some(text), "removeprefix") => {
            let (prefix,): (&str,) = from_args(args)?;
            Ok(text.strip_prefix(prefix).unwrap_or(text).into())
        }
        (Some(text), "removesuffix") => {
            let (suffix,): (&str,) = from_args(args)?;
            Ok(text.strip_suffix(suffix).unwrap_or(text).into())
        }
        _ => minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args),
    }
}

/// The test `iterable`. minijinja takes `none` for an empty list; Python does not, and templates tell by it whether
/// there are tools.
pub(super) fn is_iterable(value: &Value) -> bool {
    !value.is_none() && value.try_iter().is_ok()
}

/// The float in `value`, unless it is something else.
pub(super) fn float(value: &Value) -> Option<f64> {
    if value.is_number() && !value.is_integer() { f64::try_from(value.clone()).ok() } else { None }
}

/// `repr(float)`: the shortest digits that read back the same, with an exponent below 1e-4 and from 1e16 on.
pub(super) fn float_repr(x: f64) -> String {
    if !x.is_finite() {
        return if x.is_nan() { "nan".into() } else { format!("{}inf", if x < 0.0 { "-" } else { "" }) };
    }
    let magnitude = x.abs();
    if magnitude == 0.0 || (1e-4..1e16).contains(&magnitude) {
        return format!("{x:?}"); // Rust's Debug switches to exponents at 1e-5 and 1e16
    }
    let scientific = format!("{x:e}");
    let (digits, exponent) = scientific.split_once('e').expect("{:e} writes an exponent");
    let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |exponent| ('-', exponent));
    format!("{digits}e{sign}{exponent:0>2}")
}

pub(super) fn invalid(reason: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, reason)
}

/// Writes a value as `{{ value }}` does.
pub(super) fn format(out: &mut Output, state: &mut State, value: &Value) -> Result<(), Error> {
    Ok(out.write_str(&str(state, value)?)?)
}

/// The filter `string`.
pub(super) fn string(state: &State, value: &Value) -> Result<Value, Error> {
    Ok(if value.kind() == ValueKind::String { value.clone() } else { str(state, value)?.into_owned().into() })
}

/// `str(value)`: strings as they are, all else by [`repr`].
fn str<'v>(state: &State, value: &'v Value) -> Result<Cow<'v, str>, Error> {
    if let Some(text) = value.as_str() {
        return Ok(text.into());
    }
    let mut out = String::new();
    if !value.is_undefined() {
        repr(state, value, 0, &mut out)?;
    }
    Ok(out.into())
}

/// `repr(value)`. Paid for as it is written: lists that hold one another are small, and print without end.
fn repr(state: &State, value: &Value, depth: usize, out: &mut String) -> Result<(), Error> {
    state.consume_fuel(1)?;
    if depth > MAX_DEPTH {
        return Err(invalid(format!("a value nested deeper than {MAX_DEPTH} cannot be written")));
    }
    if let Some(x) = float(value) {
        out.push_str(&float_repr(x));
        return Ok(());
    }
    match value.kind() {
        ValueKind::Seq | ValueKind::Iterable => {
            let (open, close) = if value.is_tuple() { ('(', ')') } else { ('[', ']') };
            out.push(open);
            for (i, item) in value.try_iter()?.enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                repr(state, &item, depth + 1, out)?;
            }
            out.push_str(if value.is_tuple() && value.len() == Some(1) { "," } else { "" });
            out.push(close);
        }
        ValueKind::Map => {
            out.push('{');
            for (i, key) in value.try_iter()?.enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                repr(state, &key, depth + 1, out)?;
                out.push_str(": ");
                repr(state, &value.get_item(&key)?, depth + 1, out)?;
            }
            out.push('}');
        }
        _ => {
            // minijinja's Debug is Python's repr for the kinds that are left, except that Python escapes a few more
            // invisible characters (U+2028, U+00AD) in a string within a list.
            let written = format!("{value:?}");
            state.consume_fuel(written.len() as u64 / 64)?; // lengths fit 64 bits
            out.push_str(&written);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::float_repr;

    /// Expected values by Python's `repr`.
    #[test]
    fn floats_as_python() {
        for (x, want) in [
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (1.0, "1.0"),
            (0.1, "0.1"),
            (-2.5, "-2.5"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (1.5e-7, "1.5e-07"),
            (1e15, "1000000000000000.0"),
            (9007199254740993.0, "9007199254740992.0"),
            (1e16, "1e+16"),
            (1.25e100, "1.25e+100"),
            (f64::MIN_POSITIVE, "2.2250738585072014e-308"),
            (f64::NEG_INFINITY, "-inf"),
            (f64::NAN, "nan"),
        ] {
            assert_eq!(float_repr(x), want);
        }
    }
}
