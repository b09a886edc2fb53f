//! Which experts each side chose in a layer, and by how much: the first thing to look at when a mixture of experts parts.

use serde::{Deserialize, Serialize};

/// Rows that are told of one by one; those whose experts differ come first.
pub const ROWS: usize = 64;

/// A layer of a step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Routing {
    /// The step.
    pub step: usize,
    /// The layer.
    pub layer: usize,
    /// Rows of the step.
    pub total: usize,
    /// Rows whose experts, or their order, differ.
    pub differing: usize,
    /// At most [`ROWS`] of the rows, in order.
    pub rows: Vec<Routed>,
}

/// A row.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Routed {
    /// The row of the step.
    pub row: usize,
    /// The left's.
    pub left: Choice,
    /// The right's; none if it is the left's in experts and margin.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub right: Option<Choice>,
}

/// The experts of a row.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Choice {
    /// Ids in rank order, `K`.
    pub experts: Vec<u32>,
    /// By how much the last chosen scored above the first that was not, before softmax; none where a score is no number,
    /// or none is left over.
    pub margin: Option<f64>,
}

impl Choice {
    /// Of a row's `experts` `[K]` and `logits` `[E]`.
    fn of(experts: &[f32], logits: &[f32]) -> Choice {
        // Ids are small integers, exact as f32; of a broken side anything may come, and saturates.
        let experts: Vec<u32> = experts.iter().map(|&id| id as u32).collect();
        let score = |id: &u32| logits.get(*id as usize).copied();
        let worst = experts.iter().filter_map(score).reduce(f32::min);
        let others = (0..logits.len() as u32).filter(|id| !experts.contains(id));
        let best = others.filter_map(|id| score(&id)).reduce(f32::max);
        let finite = logits.iter().all(|v| v.is_finite());
        let margin =
            worst.zip(best).filter(|_| finite).map(|(worst, best)| f64::from(worst) - f64::from(best));
        Choice { experts, margin }
    }
}

impl Routing {
    /// Of what both sides have after [`model::Stage::Route`]: `[experts [T, K], router logits [T, E]]` of the left and of
    /// the right; of a side alone, give it twice.
    ///
    /// # Panics
    /// If there are no rows, or the two sides differ in shape.
    pub fn of(step: usize, layer: usize, rows: usize, left: [&[f32]; 2], right: [&[f32]; 2]) -> Routing {
        assert!(rows > 0 && left.map(<[f32]>::len) == right.map(<[f32]>::len), "two runs of one step");
        let row = |side: [&[f32]; 2], row: usize| {
            let part = side.map(|values| &values[row * (values.len() / rows)..][..values.len() / rows]);
            Choice::of(part[0], part[1])
        };
        let mut all: Vec<Routed> = (0..rows)
            .map(|i| {
                let (left, right) = (row(left, i), row(right, i));
                let right = (left != right).then_some(right);
                Routed { row: i, left, right }
            })
            .collect();
        let differs = |r: &Routed| r.right.as_ref().is_some_and(|right| right.experts != r.left.experts);
        let differing = all.iter().filter(|r| differs(r)).count();
        all.sort_by_key(|r| !differs(r)); // stable
        all.truncate(ROWS);
        all.sort_by_key(|r| r.row);
        Routing { step, layer, total: rows, differing, rows: all }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn margins() {
        let check = |experts: &[f32], logits: &[f32], want: Option<f64>| {
            assert_eq!(Choice::of(experts, logits).margin, want, "{experts:?} {logits:?}")
        };
        check(&[2.0, 0.0], &[1.0, 0.5, 4.0, -1.0], Some(0.5));
        check(&[0.0], &[1.0], None);
        check(&[0.0], &[1.0, f32::NAN], None);
        check(&[7.0], &[1.0, 2.0], None);
        // A side that chose wrongly has a margin below zero.
        check(&[0.0], &[1.0, 2.0], Some(-1.0));
    }

    #[test]
    fn rows_that_differ_are_never_left_out() {
        let rows = ROWS + 10;
        let logits: Vec<f32> = (0..rows).flat_map(|_| [3.0, 2.0, 1.0]).collect();
        let left: Vec<f32> = vec![0.0; rows];
        let mut right = left.clone();
        right[rows - 1] = 1.0;
        let found = Routing::of(1, 2, rows, [&left, &logits], [&right, &logits]);
        assert_eq!((found.total, found.differing, found.rows.len()), (rows, 1, ROWS));
        let last = found.rows.last().expect("rows");
        assert_eq!((last.row, last.right.as_ref().map(|r| r.experts[0])), (rows - 1, Some(1)));
        assert!(found.rows[0].right.is_none());
    }
}
