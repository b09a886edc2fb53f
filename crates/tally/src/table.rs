//! Tables: rows of text, aligned for a terminal or written as Markdown. Knows nothing of what is in them.

use std::io::{self, Write};

/// On which side a column is flush.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Align {
    /// Words.
    Left,
    /// Numbers.
    Right,
}

/// A table with a heading for each column.
pub(crate) struct Table {
    columns: Vec<(&'static str, Align)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// An empty table.
    pub(crate) fn new(columns: &[(&'static str, Align)]) -> Table {
        Table { columns: columns.to_vec(), rows: Vec::new() }
    }

    /// Appends a row.
    ///
    /// # Panics
    /// If it does not have a cell for each column.
    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let cells: Vec<_> = cells.into_iter().collect();
        assert_eq!(cells.len(), self.columns.len(), "cells and columns");
        self.rows.push(cells);
    }

    /// Writes the table in columns two spaces apart, each line begun by `indent`.
    pub(crate) fn text(&self, indent: &str, out: &mut impl Write) -> io::Result<()> {
        let widths = self.widths(0);
        for cells in self.lines() {
            let cells = cells.iter().zip(&self.columns).zip(&widths);
            let line: Vec<_> = cells.map(|((cell, &(_, align)), &width)| pad(cell, align, width)).collect();
            writeln!(out, "{}", format!("{indent}{}", line.join("  ")).trim_end())?;
        }
        Ok(())
    }

    /// Writes the table as Markdown, padded so that it is readable unrendered.
    pub(crate) fn markdown(&self, out: &mut impl Write) -> io::Result<()> {
        let widths = self.widths(2);
        for (i, cells) in self.lines().enumerate() {
            let cells = cells.iter().zip(&self.columns).zip(&widths);
            let line: Vec<_> = cells.map(|((cell, &(_, align)), &width)| pad(cell, align, width)).collect();
            writeln!(out, "| {} |", line.join(" | "))?;
            if i == 0 {
                let rule = self.columns.iter().zip(&widths).map(|(&(_, align), &width)| match align {
                    Align::Left => "-".repeat(width),
                    Align::Right => format!("{}:", "-".repeat(width - 1)),
                });
                writeln!(out, "| {} |", rule.collect::<Vec<_>>().join(" | "))?;
            }
        }
        Ok(())
    }

    /// The heading, then the rows.
    fn lines(&self) -> impl Iterator<Item = Vec<&str>> {
        let heading = self.columns.iter().map(|&(name, _)| name).collect();
        std::iter::once(heading).chain(self.rows.iter().map(|row| row.iter().map(String::as_str).collect()))
    }

    /// The width of each column in characters, at least `least`.
    fn widths(&self, least: usize) -> Vec<usize> {
        let mut widths = vec![least; self.columns.len()];
        for cells in self.lines() {
            for (width, cell) in widths.iter_mut().zip(cells) {
                *width = (*width).max(cell.chars().count());
            }
        }
        widths
    }
}

fn pad(cell: &str, align: Align, width: usize) -> String {
    match align {
        Align::Left => format!("{cell:<width$}"),
        Align::Right => format!("{cell:>width$}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aligned_and_as_markdown() {
        let mut table = Table::new(&[("name", Align::Left), ("n", Align::Right)]);
        table.row(["é".into(), "1000".into()]);
        table.row(["longer".into(), "7".into()]);
        let check = |write: &dyn Fn(&mut Vec<u8>) -> io::Result<()>, want: &str| {
            let mut out = Vec::new();
            write(&mut out).expect("writing to memory cannot fail");
            assert_eq!(String::from_utf8(out).expect("text"), want);
        };
        check(&|out| table.text("  ", out), "  name       n\n  é       1000\n  longer     7\n");
        check(
            &|out| table.markdown(out),
            "| name   |    n |\n| ------ | ---: |\n| é      | 1000 |\n| longer |    7 |\n",
        );
    }
}
