//! The filter `tojson`: Python's `json.dumps` over template values. Knows nothing of messages.

use std::fmt::Write as _;

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Error, State};

use super::python::{MAX_DEPTH, float, float_repr, invalid};

/// The filter `tojson` as `transformers` defines it: Python's `json.dumps`, nothing escaped for HTML, and by
/// default `ensure_ascii=False`.
pub(super) fn tojson(state: &State, value: &Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let separators: Option<Vec<String>> = options.get("separators")?;
    let (item, key) = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => return Err(invalid("tojson: separators must be a pair of strings")),
        None => (if indent.is_some() { "," } else { ", " }.into(), ": ".into()),
    };
    let mut json = Json {
        state,
        out: String::new(),
        indent,
        separators: [item, key],
        sort_keys: options.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        ensure_ascii: options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
    };
    options.assert_all_used()?;
    json.value(value, 0)?;
    Ok(json.out.into())
}

/// A writer of JSON as Python writes it.
struct Json<'a, 'env, 'state> {
    state: &'a State<'env, 'state>,
    out: String,
    indent: Option<usize>,
    /// Between items, and between a key and its value.
    separators: [String; 2],
    sort_keys: bool,
    ensure_ascii: bool,
}

impl Json<'_, '_, '_> {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        // Paid as it is written: lists that contain one another can be small and print without end.
        self.state.consume_fuel(1)?;
        if depth > MAX_DEPTH {
            return Err(invalid(format!("tojson: nested deeper than {MAX_DEPTH}")));
        }
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.number(value),
            ValueKind::String => self.string(value.as_str().unwrap_or_default())?,
            ValueKind::Seq | ValueKind::Iterable => {
                self.container('[', ']', value.try_iter()?, depth, |json, item| {
                    json.value(&item, depth + 1)
                })?;
            }
            ValueKind::Map => {
                let mut pairs: Vec<(String, Value)> = Vec::new();
                for key in value.try_iter()? {
                    self.state.consume_fuel(1)?;
                    let item = value.get_item(&key)?;
                    pairs.push((self.key(&key)?, item));
                }
                if self.sort_keys {
                    pairs.sort_by(|a, b| a.0.cmp(&b.0));
                }
                self.container('{', '}', pairs.into_iter(), depth, |json, (key, item)| {
                    json.string(&key)?;
                    json.out.push_str(&json.separators[1]);
                    json.value(&item, depth + 1)
                })?;
            }
            kind => return Err(invalid(format!("tojson: a value of kind {kind} is not JSON"))),
        }
        Ok(())
    }

    fn number(&mut self, value: &Value) {
        self.out.push_str(&match float(value) {
            Some(x) if x.is_nan() => "NaN".into(),
            Some(x) if x.is_infinite() => if x < 0.0 { "-Infinity" } else { "Infinity" }.into(),
            Some(x) => float_repr(x),
            None => value.to_string(),
        });
    }

    /// A key of a map as `json.dumps` turns it into a string.
    fn key(&self, key: &Value) -> Result<String, Error> {
        match key.kind() {
            ValueKind::String => Ok(key.as_str().unwrap_or_default().to_owned()),
            ValueKind::None => Ok("null".into()),
            ValueKind::Bool => Ok(key.is_true().to_string()),
            ValueKind::Number => Ok(float(key).map_or_else(|| key.to_string(), float_repr)),
            kind => Err(invalid(format!("tojson: a key of kind {kind} is not JSON"))),
        }
    }

    fn string(&mut self, text: &str) -> Result<(), Error> {
        self.state.consume_fuel(text.len() as u64 / 64)?; // lengths fit 64 bits
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{C}' => self.out.push_str("\\f"),
                c if c < ' ' || (self.ensure_ascii && c > '~') => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        write!(self.out, "\\u{unit:04x}").expect("a String takes all writes");
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
        Ok(())
    }

    fn container<T>(
        &mut self,
        open: char,
        close: char,
        items: impl Iterator<Item = T>,
        depth: usize,
        mut write: impl FnMut(&mut Self, T) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.out.push(open);
        let mut is_empty = true;
        for item in items {
            if !is_empty {
                self.out.push_str(&self.separators[0]);
            }
            is_empty = false;
            self.new_line(depth + 1);
            write(self, item)?;
        }
        if !is_empty {
            self.new_line(depth);
        }
        self.out.push(close);
        Ok(())
    }

    fn new_line(&mut self, depth: usize) {
        if let Some(indent) = self.indent {
            self.out.push('\n');
            self.out.extend(std::iter::repeat_n(' ', indent.min(16) * depth));
        }
    }
}
