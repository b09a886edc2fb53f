//! The type map: which type each kind of tensor has in which layers, drawn one character a layer.
//!
//! A file mix gives some layers of a kind another type than the rest, and code that picks a kernel by the kind and not
//! by the tensor breaks there. The map is where one sees it coming.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write};

use anstyle::{AnsiColor, Style};
use gguf::{Dtype, Tensor};
use serde_json::{Value, json};

use super::describe;
use crate::output::printable;

/// Files with more layers than fit a wide terminal are listed and not drawn.
const MOST_LAYERS_DRAWN: usize = 160;
/// Rows of tensors outside layers, after which the table of `--tensors` is the better place to look.
const MOST_OTHERS: usize = 24;

/// See the module.
pub(super) struct TypeMap<'a> {
    /// In file order: the name without `blk.N.` and `.weight`, and the type in each layer that has it.
    kinds: Vec<(&'a str, Layers)>,
    /// Tensors outside layers.
    others: Vec<&'a Tensor>,
    layers: usize,
}

type Layers = BTreeMap<usize, Dtype>;

impl<'a> TypeMap<'a> {
    pub(super) fn of(tensors: &'a [Tensor]) -> TypeMap<'a> {
        let mut map = TypeMap { kinds: Vec::new(), others: Vec::new(), layers: 0 };
        let mut places = BTreeMap::new();
        for tensor in tensors {
            let Some((layer, kind)) = layer_and_kind(&tensor.name) else {
                map.others.push(tensor);
                continue;
            };
            let place = *places.entry(kind).or_insert_with(|| {
                map.kinds.push((kind, Layers::new()));
                map.kinds.len() - 1
            });
            map.kinds[place].1.insert(layer, tensor.dtype);
            map.layers = map.layers.max(layer + 1);
        }
        map
    }

    pub(super) fn write(&self, out: &mut impl Write) -> io::Result<()> {
        if self.layers > 0 {
            self.draw(out)?;
            self.list_mixed(out)?;
        }
        if !self.others.is_empty() {
            writeln!(out, "\nOutside layers")?;
            for tensor in self.others.iter().take(MOST_OTHERS) {
                let Tensor { name, dtype, dims, .. } = tensor;
                writeln!(out, "  {:<20} {dtype:<5} {}", printable(short(name)), describe::shape(dims))?;
            }
            if let more @ 1.. = self.others.len().saturating_sub(MOST_OTHERS) {
                writeln!(out, "  and {more} more; --tensors lists all")?;
            }
        }
        Ok(())
    }

    fn draw(&self, out: &mut impl Write) -> io::Result<()> {
        let width = self.kinds.iter().map(|(kind, _)| kind.chars().count()).max().unwrap_or(0).min(32);
        let drawn = self.layers <= MOST_LAYERS_DRAWN;
        writeln!(out, "\nTypes by layer")?;
        if drawn {
            for ruler in ruler(self.layers) {
                writeln!(out, "  {:width$}  {ruler}", "")?;
            }
        }
        for (kind, layers) in &self.kinds {
            write!(out, "  {:width$}  ", printable(kind))?;
            for layer in (0..self.layers).filter(|_| drawn) {
                match layers.get(&layer) {
                    Some(&dtype) => write!(out, "{0}{1}{0:#}", style(dtype), letter(dtype))?,
                    None => write!(out, "·")?,
                }
            }
            let types: BTreeSet<_> = layers.values().copied().collect();
            let types: Vec<_> = types.into_iter().map(Dtype::name).collect();
            writeln!(out, "  {}", types.join(" and "))?;
        }
        if drawn {
            let used: BTreeSet<_> =
                self.kinds.iter().flat_map(|(_, layers)| layers.values().copied()).collect();
            write!(out, "  {:width$}", "")?;
            for dtype in used {
                write!(out, "  {0}{1}{0:#} {dtype}", style(dtype), letter(dtype))?;
            }
            writeln!(out)?;
        }
        Ok(())
    }

    /// In words, the kinds that have more than one type or are missing in some layers; those that agree in one line.
    fn list_mixed(&self, out: &mut impl Write) -> io::Result<()> {
        let mut mixed: Vec<(Vec<&str>, &Layers)> = Vec::new();
        for (kind, layers) in &self.kinds {
            let first = layers.values().next();
            if layers.len() == self.layers && layers.values().all(|dtype| Some(dtype) == first) {
                continue;
            }
            match mixed.iter_mut().find(|(_, other)| *other == layers) {
                Some((kinds, _)) => kinds.push(kind),
                None => mixed.push((vec![kind], layers)),
            }
        }
        for (kinds, layers) in mixed {
            writeln!(out, "\n  {}", printable(&kinds.join(", ")))?;
            for (dtype, layers) in by_type(layers) {
                writeln!(out, "    {0}{dtype:<4}{0:#} in {1}", style(dtype), runs(&layers))?;
            }
        }
        Ok(())
    }

    /// `{"attn_v": {"Q6_K": [0, 1], "Q4_K": [2]}, ...}`; tensors outside layers have their type alone.
    pub(super) fn to_json(&self) -> Value {
        let kind = |(kind, layers): &(&str, Layers)| {
            let types =
                by_type(layers).into_iter().map(|(dtype, layers)| (dtype.name().to_owned(), json!(layers)));
            ((*kind).to_owned(), Value::Object(types.collect()))
        };
        let other = |tensor: &&Tensor| (short(&tensor.name).to_owned(), json!(tensor.dtype.name()));
        json!({
            "layers": Value::Object(self.kinds.iter().map(kind).collect()),
            "outside": Value::Object(self.others.iter().map(other).collect()),
        })
    }
}

/// `blk.7.attn_v.weight` is layer 7, `attn_v`; `blk.7.attn_v.bias` is layer 7, `attn_v.bias`.
fn layer_and_kind(name: &str) -> Option<(usize, &str)> {
    let (layer, kind) = name.strip_prefix("blk.")?.split_once('.')?;
    // Far above any model; a hostile name must not make a long drawing or overflow a count.
    let layer = layer.parse().ok().filter(|&layer: &usize| layer < 1 << 16)?;
    Some((layer, short(kind)))
}

fn short(name: &str) -> &str {
    name.strip_suffix(".weight").unwrap_or(name)
}

/// The layers of each type, the type of the first layer first.
fn by_type(layers: &Layers) -> Vec<(Dtype, Vec<usize>)> {
    let mut types: Vec<(Dtype, Vec<usize>)> = Vec::new();
    for (&layer, &dtype) in layers {
        match types.iter_mut().find(|(other, _)| *other == dtype) {
            Some((_, layers)) => layers.push(layer),
            None => types.push((dtype, vec![layer])),
        }
    }
    types
}

/// Ascending numbers as `0-5, 8, 11, 41-47`.
fn runs(layers: &[usize]) -> String {
    let run = |run: &[usize]| match *run {
        [only] => only.to_string(),
        [first, second] => format!("{first}, {second}"),
        [first, .., last] => format!("{first}-{last}"),
        [] => unreachable!("a chunk is never empty"),
    };
    layers.chunk_by(|a, b| a + 1 == *b).map(run).collect::<Vec<_>>().join(", ")
}

/// The tens, where there are any, above the units.
fn ruler(layers: usize) -> Vec<String> {
    let tens =
        (0..layers).map(|layer| if layer % 10 == 0 { (layer / 10 % 10).to_string() } else { " ".into() });
    let units = (0..layers).map(|layer| (layer % 10).to_string()).collect();
    if layers > 10 { vec![tens.collect::<String>().trim_end().to_owned(), units] } else { vec![units] }
}

/// Bits for the usual types, so that a map reads as what it costs; letters for the rest.
fn letter(dtype: Dtype) -> char {
    match dtype {
        Dtype::F32 => 'F',
        Dtype::F16 => 'H',
        Dtype::BF16 => 'B',
        Dtype::Q8_0 => '8',
        Dtype::Q6K => '6',
        Dtype::Q5K => '5',
        Dtype::Q4K => '4',
        Dtype::Q3K => '3',
        Dtype::Q2K => '2',
        Dtype::Q4_0 => 'q',
        Dtype::Q4_1 => 'r',
        Dtype::Q5_0 => 's',
        Dtype::Q5_1 => 't',
    }
}

fn style(dtype: Dtype) -> Style {
    let colour = match dtype {
        Dtype::F32 | Dtype::F16 | Dtype::BF16 => AnsiColor::BrightBlack,
        Dtype::Q8_0 => AnsiColor::Cyan,
        Dtype::Q6K => AnsiColor::Green,
        Dtype::Q5K | Dtype::Q5_0 | Dtype::Q5_1 => AnsiColor::Yellow,
        Dtype::Q4K | Dtype::Q4_0 | Dtype::Q4_1 => AnsiColor::BrightBlue,
        Dtype::Q3K => AnsiColor::Magenta,
        Dtype::Q2K => AnsiColor::Red,
    };
    colour.on_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_layers() {
        let check = |layers: &[usize], want: &str| assert_eq!(runs(layers), want);
        check(&[0, 1, 2, 3, 4, 5, 8, 11, 41, 42, 43], "0-5, 8, 11, 41-43");
        check(&[6, 7, 9, 10, 12, 13], "6, 7, 9, 10, 12, 13");
        check(&[3], "3");
        check(&[], "");
    }

    #[test]
    fn names_of_layers() {
        let check = |name, want| assert_eq!(layer_and_kind(name), want, "{name}");
        check("blk.7.attn_v.weight", Some((7, "attn_v")));
        check("blk.7.attn_v.bias", Some((7, "attn_v.bias")));
        check("blk.99999999.attn_v.weight", None);
        check("blk.x.attn_v.weight", None);
        check("output.weight", None);
    }

    #[test]
    fn no_letter_has_two_meanings() {
        assert_eq!(BTreeSet::from(Dtype::ALL.map(letter)).len(), Dtype::ALL.len());
    }
}
