//! Which KV blocks are free and which sequence holds which. Knows ids only; the memory is the backend's.

/// The KV blocks of a backend.
#[derive(Debug)]
pub struct BlockPool {
    /// Free ids, the next one to hand out last.
    free: Vec<u32>,
    total: usize,
}

/// There are fewer free blocks than a sequence needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{wanted} more KV blocks are needed, {free} of {total} are free")]
pub struct OutOfBlocks {
    /// Asked for.
    pub wanted: usize,
    /// Free.
    pub free: usize,
    /// In all.
    pub total: usize,
}

impl BlockPool {
    /// A pool of `blocks` free blocks, handed out in ascending order.
    pub fn new(blocks: usize) -> BlockPool {
        // A backend with 2^32 blocks of 64 positions would hold 2^38 positions.
        let blocks = u32::try_from(blocks).unwrap_or(u32::MAX);
        BlockPool { free: (0..blocks).rev().collect(), total: blocks as usize }
    }

    /// Free blocks.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Lengthens `table` to at least `blocks` entries, or changes nothing.
    pub fn extend(&mut self, table: &mut Vec<u32>, blocks: usize) -> Result<(), OutOfBlocks> {
        let wanted = blocks.saturating_sub(table.len());
        let Some(rest) = self.free.len().checked_sub(wanted) else {
            return Err(OutOfBlocks { wanted, free: self.free.len(), total: self.total });
        };
        table.extend(self.free.drain(rest..).rev());
        Ok(())
    }

    /// Shortens `table` to `blocks` entries and takes the others back.
    pub fn truncate(&mut self, table: &mut Vec<u32>, blocks: usize) {
        while table.len() > blocks {
            self.free.extend(table.pop());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_handed_out_once_and_come_back() {
        let mut pool = BlockPool::new(4);
        let (mut a, mut b) = (vec![], vec![]);
        pool.extend(&mut a, 3).unwrap();
        assert_eq!(a, [0, 1, 2]);
        assert_eq!(pool.extend(&mut b, 2), Err(OutOfBlocks { wanted: 2, free: 1, total: 4 }));
        assert!(b.is_empty(), "a refusal changes nothing");
        pool.truncate(&mut a, 1);
        pool.extend(&mut b, 2).unwrap();
        assert_eq!((a, b, pool.free()), (vec![0], vec![1, 2], 1));
    }
}
