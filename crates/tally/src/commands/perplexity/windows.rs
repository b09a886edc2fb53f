//! How a text is cut for scoring: windows that do not overlap, of which the second half is scored.
//!
//! This is what llama.cpp's `perplexity` does unless told otherwise, so that figures can be compared: each window of
//! `ctx` tokens starts with an empty cache; its first `ctx / 2` tokens are context only, and each of the others but
//! the first of them is predicted from all before it: `ctx - 1 - ctx / 2` predictions a window. What is left at the
//! end of the text is dropped. A model that wants one gets its begin-of-sequence token in place of the first of each
//! window.

use std::ops::Range;

/// A text's tokens, cut.
pub(super) struct Windows {
    ctx: usize,
    /// Whole windows, one after the other.
    ids: Vec<u32>,
}

impl Windows {
    /// Tokens of the shortest window that scores anything on some context.
    pub(super) const LEAST: u32 = 4;

    /// Cuts `ids` into windows of `ctx` tokens, at most `limit` of them.
    pub(super) fn cut(mut ids: Vec<u32>, ctx: usize, limit: Option<usize>, bos: Option<u32>) -> Windows {
        // llama.cpp puts the token before the text as well; windows begin where its windows begin.
        ids.splice(0..0, bos);
        let count = (ids.len() / ctx).min(limit.unwrap_or(usize::MAX));
        ids.truncate(count * ctx);
        if let Some(bos) = bos {
            ids.iter_mut().step_by(ctx).for_each(|first| *first = bos);
        }
        Windows { ctx, ids }
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.ids.len() / self.ctx
    }

    /// Tokens of each.
    pub(super) fn ctx(&self) -> usize {
        self.ctx
    }

    /// The tokens of all.
    pub(super) fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Where in a window the tokens lie whose logits are scored, each against the token after it.
    pub(super) fn scored(&self) -> Range<usize> {
        self.ctx / 2..self.ctx - 1
    }

    /// The windows in order.
    pub(super) fn iter(&self) -> impl Iterator<Item = &[u32]> {
        self.ids.chunks_exact(self.ctx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cuts() {
        let check = |tokens: u32, ctx, limit, bos, scored, want: &[&[u32]]| {
            let windows = Windows::cut((0..tokens).collect(), ctx, limit, bos);
            assert_eq!(windows.iter().collect::<Vec<_>>(), want, "{tokens} by {ctx}");
            assert_eq!((windows.count(), windows.scored()), (want.len(), scored));
        };
        check(3, 4, None, None, 2..3, &[]);
        check(4, 4, None, None, 2..3, &[&[0, 1, 2, 3]]);
        check(9, 4, None, None, 2..3, &[&[0, 1, 2, 3], &[4, 5, 6, 7]]);
        check(9, 4, Some(1), None, 2..3, &[&[0, 1, 2, 3]]);
        check(5, 5, Some(7), None, 2..4, &[&[0, 1, 2, 3, 4]]);
        check(7, 4, None, Some(9), 2..3, &[&[9, 0, 1, 2], &[9, 4, 5, 6]]);
    }
}
