//! All faults by name, of both kinds: those of a backend's weights and stages, and those of a GPU's kernels. Plants none.

use parity::faults::{self, Planted};
use serde_json::{Value, json};

use super::kernels::{self, KernelFault};

/// A fault of either kind.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Entry {
    /// In the weights, or around the stages, of any device.
    Planted(Planted),
    /// In the kernels of a GPU or the emulator.
    Kernel(KernelFault),
}

impl Entry {
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Entry::Planted(fault) => fault.name,
            Entry::Kernel(fault) => fault.name,
        }
    }

    fn what(&self) -> &'static str {
        match self {
            Entry::Planted(fault) => fault.what,
            Entry::Kernel(fault) => fault.what,
        }
    }

    /// Index into [`KINDS`].
    fn kind(&self) -> usize {
        match self {
            Entry::Planted(fault) if fault.in_model() => 0,
            Entry::Planted(_) => 1,
            Entry::Kernel(_) => 2,
        }
    }
}

/// Where faults are: for programs, and for people with how such a side is named.
const KINDS: [(&str, &str); 3] = [
    (
        "model",
        "In the weights or the configuration, as the faulty side reads them: faulty:NAME, or faulty:NAME@DEVICE",
    ),
    ("stages", "In the stages, whatever computes them: faulty:NAME, or faulty:NAME@DEVICE"),
    ("kernels", "In a GPU's kernels: faulty:NAME on cuda, or faulty:NAME@cuda:N, or faulty:NAME@emulated"),
];

/// Every fault, those of backends first.
pub(super) fn all() -> Vec<Entry> {
    let kernels = kernels::ALL.iter().copied().map(Entry::Kernel);
    faults::all().into_iter().map(Entry::Planted).chain(kernels).collect()
}

/// The fault of this name, or what to ask for in its place.
pub(crate) fn named(name: &str) -> Result<Entry, String> {
    let all = all();
    if let Some(&entry) = all.iter().find(|entry| entry.name() == name) {
        return Ok(entry);
    }
    let near = |is_near: &dyn Fn(&Entry) -> bool| -> Vec<String> {
        all.iter().filter(|entry| is_near(entry)).map(|entry| format!("`{}`", entry.name())).take(3).collect()
    };
    let mut likely = near(&|entry| alike(name, entry.name()));
    if likely.is_empty() {
        likely = near(&|entry| described(name, entry.what()));
    }
    let near = if likely.is_empty() { String::new() } else { format!(" (is it {}?)", likely.join(", or ")) };
    Err(format!("there is no fault `{}`{near}; `tally faults --list` shows all", name.escape_debug()))
}

/// Whether who wrote one may have meant the other: a slip of two letters, or a part of the name.
fn alike(written: &str, name: &str) -> bool {
    written.len() >= 4 && (name.contains(written) || distance(written, name) <= 2)
}

/// Whether a telling word of what was written is in what a fault is said to be.
fn described(written: &str, what: &str) -> bool {
    written.split('-').any(|word| word.len() >= 5 && what.contains(word))
}

/// Levenshtein's: how many letters to insert, leave out or replace.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, a) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, &b) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(a != b);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

/// A line each, by where they are.
pub(super) fn text() -> String {
    let all = all();
    let width = all.iter().map(|entry| entry.name().len()).max().unwrap_or(0);
    let group = |(kind, (_, heading)): (usize, &(&str, &str))| {
        let its = all.iter().filter(|entry| entry.kind() == kind);
        let lines = its.map(|entry| format!("  {:<width$}  {}\n", entry.name(), entry.what()));
        format!("{heading}\n{}", lines.collect::<String>())
    };
    KINDS.iter().enumerate().map(group).collect::<Vec<_>>().join("\n")
}

pub(super) fn json() -> Value {
    let entry =
        |entry: &Entry| json!({ "name": entry.name(), "what": entry.what(), "in": KINDS[entry.kind()].0 });
    json!({ "faults": all().iter().map(entry).collect::<Vec<_>>() })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_fault_has_a_name_of_its_own() {
        let all = all();
        let names: BTreeSet<&str> = all.iter().map(Entry::name).collect();
        assert_eq!(names.len(), all.len());
        for name in names {
            assert_eq!(named(name).map(|entry| entry.name()), Ok(name));
            // `@` ends a name in a side's, and `,` in a list.
            assert!(name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-'), "{name}");
        }
    }

    #[test]
    fn what_was_meant() {
        let check = |written: &str, hint: &str| match named(written) {
            Ok(entry) => panic!("{written} is {}", entry.name()),
            Err(error) => assert!(error.contains(hint), "{written}: {error}"),
        };
        check("one-kernel-for-all-typse", "(is it `one-kernel-for-all-types`?)");
        check("rope", "(is it `wrong-rope-base`, or `interleaved-rope`?)");
        check("layer-6-story", "(is it `one-kernel-for-all-types`, or `kernel-down-read-as-q6-k`?)");
        check("something", "`something`; ");
        check("", "``; ");
    }

    #[test]
    fn distances() {
        for (a, b, want) in
            [("", "", 0), ("abc", "", 3), ("", "abc", 3), ("kitten", "sitting", 3), ("ab", "ba", 2)]
        {
            assert_eq!(distance(a, b), want, "{a} {b}");
        }
    }
}
