//! KV blocks that sequences share: who holds which, which of them carry a text that others may begin with, and what is
//! given up when memory runs short. Knows ids and tokens; the memory is the backend's.
//!
//! A block that is full and known to be sound can be *published*: it is then found under its parent block and its 64
//! tokens, so that a path of published blocks spells the beginning of a text. Keys are compared whole, not by a hash:
//! no collision can hand one request the keys and values of another. What lies in a block depends on nothing but the
//! tokens up to its end (ARCHITECTURE.md, "The promise"), so sharing it changes no bit.
//!
//! A block is *free*, *held* by one or more tables, *idle* (published, held by none: the first to be given up is the one
//! unused for the longest time, a text's end before its beginning), or in *quarantine*.

use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};

use model::BLOCK;

use crate::kv::OutOfBlocks;

/// A block's name while it is published: never used twice, so that a child of what was given up cannot be mistaken for
/// the child of what came in its place.
type Node = u64;
/// The parent of a text's first block.
const ROOT: Node = 0;

/// The part of the pool that can be in quarantine: beyond it the oldest comes back, since a poisoned model would
/// otherwise lock up all memory. Old contents are never read, so coming back is safe; staying out keeps a block whose
/// *memory* is bad from the next request.
const QUARANTINE: usize = 8;

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    parent: Node,
    /// The block's [`BLOCK`] tokens.
    tokens: Box<[u32]>,
}

#[derive(Debug)]
struct Published {
    node: Node,
    key: Key,
    /// Blocks between it and the text's beginning.
    depth: u32,
    /// When it was last let go.
    used: u64,
}

#[derive(Debug, Default)]
struct Block {
    /// Tables that hold it.
    holders: u32,
    published: Option<Published>,
    /// Goes into quarantine once nobody holds it.
    suspect: bool,
}

/// The KV blocks of a backend, shared between sequences.
#[derive(Debug)]
pub struct PrefixCache {
    blocks: Vec<Block>,
    /// Free ids, the next one to hand out last.
    free: Vec<u32>,
    /// Block ids by what they spell.
    found: HashMap<Key, u32>,
    /// Published and held by none, in the order in which they are given up: `(used, depth, id)`.
    idle: BTreeSet<(u64, Reverse<u32>, u32)>,
    /// Out of circulation, the oldest first.
    quarantine: VecDeque<u32>,
    next_node: Node,
    clock: u64,
}

impl PrefixCache {
    /// A pool of `blocks` free blocks.
    pub fn new(blocks: usize) -> PrefixCache {
        // A backend with 2^32 blocks of 64 positions would hold 2^38 positions.
        let ids = u32::try_from(blocks).unwrap_or(u32::MAX);
        PrefixCache {
            blocks: (0..ids).map(|_| Block::default()).collect(),
            free: (0..ids).rev().collect(),
            found: HashMap::new(),
            idle: BTreeSet::new(),
            quarantine: VecDeque::new(),
            next_node: ROOT + 1,
            clock: 0,
        }
    }

    /// Blocks in all.
    pub fn total(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks that a table could still get: free ones, and idle ones that would be given up.
    pub fn available(&self) -> usize {
        self.free.len() + self.idle.len()
    }

    /// Blocks that nobody holds and that are kept for their text.
    pub fn idle(&self) -> usize {
        self.idle.len()
    }

    /// Blocks out of circulation.
    pub fn quarantined(&self) -> usize {
        self.quarantine.len()
    }

    /// Takes the longest beginning of `tokens` that is published, in whole blocks; the table then holds it.
    pub fn begin(&mut self, tokens: &[u32]) -> Vec<u32> {
        let (mut parent, mut table) = (ROOT, Vec::new());
        for chunk in tokens.chunks_exact(BLOCK) {
            let Some(&id) = self.found.get(&Key { parent, tokens: chunk.into() }) else { break };
            self.hold(id);
            table.push(id);
            parent = self.published(id).expect("what is found is published").node;
        }
        table
    }

    /// Lengthens `table` to at least `blocks` entries, giving up idle blocks if need be, or changes nothing.
    ///
    /// # Errors
    /// [`OutOfBlocks`] where too few are available.
    pub fn extend(&mut self, table: &mut Vec<u32>, blocks: usize) -> Result<(), OutOfBlocks> {
        let wanted = blocks.saturating_sub(table.len());
        let free = self.available();
        if wanted > free {
            return Err(OutOfBlocks { wanted, free, total: self.total() });
        }
        for _ in 0..wanted {
            if self.free.is_empty() {
                self.give_up_oldest();
            }
            let id = self.free.pop().expect("as many are available as are wanted");
            self.blocks[id as usize].holders = 1;
            table.push(id);
        }
        Ok(())
    }

    fn give_up_oldest(&mut self) {
        if let Some((_, _, id)) = self.idle.pop_first() {
            let published = self.blocks[id as usize].published.take().expect("what is idle is published");
            self.found.remove(&published.key);
            self.free.push(id);
        }
    }

    /// Publishes the full blocks of `table` from index `from` on, whose contents are computed and sound; `tokens` are the
    /// sequence's from position 0. Returns up to which index the table is published: to be passed as the next `from`.
    ///
    /// Where another block spells the same already, the table gets that one in place of its own: they are equal in bits.
    pub fn publish(&mut self, table: &mut [u32], tokens: &[u32], from: usize) -> usize {
        let full = (tokens.len() / BLOCK).min(table.len());
        for i in from..full {
            // A parent that is suspect is no longer published, and nothing after it will be.
            let parent = match i.checked_sub(1) {
                None => ROOT,
                Some(before) => match self.published(table[before]) {
                    Some(published) => published.node,
                    None => return i,
                },
            };
            let id = table[i];
            if self.published(id).is_some() {
                continue;
            }
            if self.blocks[id as usize].suspect {
                return i;
            }
            let key = Key { parent, tokens: tokens[i * BLOCK..][..BLOCK].into() };
            if let Some(&other) = self.found.get(&key) {
                self.hold(other);
                self.let_go(id);
                table[i] = other;
                continue;
            }
            self.found.insert(key.clone(), id);
            // A table has fewer than 2^32 blocks, as ids are.
            let published = Published { node: self.next_node, key, depth: i as u32, used: 0 };
            self.blocks[id as usize].published = Some(published);
            self.next_node += 1;
        }
        full.max(from)
    }

    /// Lets go of every block from index `len` on.
    pub fn truncate(&mut self, table: &mut Vec<u32>, len: usize) {
        // One moment for all, so that ends are given up before beginnings.
        self.clock += 1;
        for id in table.drain(len.min(table.len())..) {
            self.let_go(id);
        }
    }

    /// Lets go of a table in which numbers went wrong: its blocks, and whatever continues a text from them, are never
    /// found again, and stay out of circulation for a while once nobody holds them.
    pub fn quarantine(&mut self, table: &mut Vec<u32>) {
        let mut gone: HashSet<Node> = HashSet::new();
        for &id in table.iter() {
            self.suspect(id, &mut gone);
        }
        // Parents come before children: a parent's node is always the older.
        let mut nodes: Vec<(Node, u32)> =
            self.found.values().filter_map(|&id| Some((self.published(id)?.node, id))).collect();
        nodes.sort_unstable();
        for (_, id) in nodes {
            if self.published(id).is_some_and(|published| gone.contains(&published.key.parent)) {
                self.suspect(id, &mut gone);
            }
        }
        self.truncate(table, 0);
    }

    fn suspect(&mut self, id: u32, gone: &mut HashSet<Node>) {
        let block = &mut self.blocks[id as usize];
        block.suspect = true;
        let Some(published) = block.published.take() else { return };
        gone.insert(published.node);
        self.found.remove(&published.key);
        if self.idle.remove(&(published.used, Reverse(published.depth), id)) {
            self.isolate(id);
        }
    }

    fn isolate(&mut self, id: u32) {
        self.blocks[id as usize].suspect = false;
        self.quarantine.push_back(id);
        if self.quarantine.len() > self.total().div_ceil(QUARANTINE) {
            self.free.extend(self.quarantine.pop_front());
        }
    }

    fn published(&self, id: u32) -> Option<&Published> {
        self.blocks[id as usize].published.as_ref()
    }

    fn hold(&mut self, id: u32) {
        let block = &mut self.blocks[id as usize];
        block.holders += 1;
        if let Some(published) = &block.published {
            self.idle.remove(&(published.used, Reverse(published.depth), id));
        }
    }

    fn let_go(&mut self, id: u32) {
        let clock = self.clock;
        let block = &mut self.blocks[id as usize];
        block.holders -= 1;
        if block.holders > 0 {
            return;
        }
        match &mut block.published {
            Some(published) => {
                published.used = clock;
                self.idle.insert((clock, Reverse(published.depth), id));
            }
            None if block.suspect => self.isolate(id),
            None => self.free.push(id),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// `blocks` of tokens, the `i`-th all `spelling[i]`, and half a block more.
    fn text(spelling: &[u32]) -> Vec<u32> {
        let whole = spelling.iter().flat_map(|&token| [token; BLOCK]);
        whole.chain([9; BLOCK / 2]).collect()
    }

    /// A sequence that was computed and ended: its full blocks are idle.
    fn run(cache: &mut PrefixCache, spelling: &[u32]) -> usize {
        let tokens = text(spelling);
        let mut table = cache.begin(&tokens);
        let shared = table.len();
        cache.extend(&mut table, tokens.len().div_ceil(BLOCK)).expect("enough blocks");
        cache.publish(&mut table, &tokens, shared);
        cache.truncate(&mut table, 0);
        shared
    }

    #[test]
    fn what_is_shared() {
        let mut cache = PrefixCache::new(8);
        for (spelling, shared) in [
            (&[1u32, 2] as &[u32], 0),
            (&[1, 2], 2),
            (&[1, 3, 2], 1),
            // The same tokens after another beginning are another text.
            (&[2, 2], 0),
            (&[], 0),
        ] {
            assert_eq!(run(&mut cache, spelling), shared, "{spelling:?}");
        }
        assert_eq!((cache.idle(), cache.available()), (6, 8));
    }

    #[test]
    fn ends_go_first_and_the_longest_unused() {
        let mut cache = PrefixCache::new(5);
        run(&mut cache, &[1, 2]);
        run(&mut cache, &[3]);
        run(&mut cache, &[1, 2]);
        // Four of five blocks are needed: [3] is the oldest, then the end of [1, 2].
        let mut table = Vec::new();
        cache.extend(&mut table, 4).expect("idle ones are given up");
        assert_eq!(cache.extend(&mut table, 6), Err(OutOfBlocks { wanted: 2, free: 1, total: 5 }));
        assert_eq!(cache.begin(&text(&[3])).len(), 0);
        assert_eq!(cache.begin(&text(&[1, 2])).len(), 1);
    }

    #[test]
    fn two_that_compute_the_same_end_with_one_block() {
        let mut cache = PrefixCache::new(4);
        let tokens = text(&[7]);
        let (mut a, mut b) = (vec![], vec![]);
        cache.extend(&mut a, 2).expect("enough");
        cache.extend(&mut b, 2).expect("enough");
        assert_eq!(cache.publish(&mut a, &tokens, 0), 1);
        assert_eq!(cache.publish(&mut b, &tokens, 0), 1);
        assert_eq!(a[0], b[0], "the second holds the first one's block");
        assert_ne!(a[1], b[1], "an unfinished block is nobody else's");
        assert_eq!(cache.available(), 1);
        cache.truncate(&mut a, 0);
        cache.truncate(&mut b, 0);
        assert_eq!((cache.available(), cache.idle()), (4, 1));
    }

    #[test]
    fn quarantine_reaches_what_continues_the_text() {
        let mut cache = PrefixCache::new(32);
        run(&mut cache, &[1, 2, 3]);
        run(&mut cache, &[4]);
        let mut held = cache.begin(&text(&[1, 2, 3]));
        let mut wrong = cache.begin(&text(&[1]));
        assert_eq!((held.len(), wrong.len()), (3, 1));
        cache.quarantine(&mut wrong);
        assert_eq!(cache.begin(&text(&[1, 2, 3])).len(), 0, "nobody is led there again");
        assert_eq!(cache.begin(&text(&[4])).len(), 1, "others are undisturbed");
        assert_eq!(cache.quarantined(), 0, "who holds a block keeps it");
        assert_eq!(cache.publish(&mut held, &text(&[1, 2, 3]), 3), 3);
        cache.truncate(&mut held, 0);
        assert_eq!(cache.quarantined(), 3);
        // Bounded: the oldest come back.
        for i in 10..20 {
            let tokens = text(&[i]);
            let mut table = cache.begin(&tokens);
            cache.extend(&mut table, 2).expect("enough");
            cache.quarantine(&mut table);
        }
        assert_eq!(cache.quarantined(), 4);
    }

    proptest! {
        /// Whatever sequences do, no block is lost and none is handed out twice, and a shared beginning is the right one.
        #[test]
        fn blocks_are_conserved(actions in prop::collection::vec(
            (0u8..10, prop::collection::vec(0u32..3, 0..5)), 1..60)) {
            let mut cache = PrefixCache::new(12);
            // What each block was last computed for: all tokens up to its end.
            let mut contents: HashMap<u32, Vec<u32>> = HashMap::new();
            let mut running: VecDeque<(Vec<u32>, Vec<u32>)> = VecDeque::new();
            for (action, spelling) in actions {
                match action {
                    0..6 => {
                        let tokens = text(&spelling);
                        let mut table = cache.begin(&tokens);
                        let shared = table.len();
                        for (i, id) in table.iter().enumerate() {
                            prop_assert_eq!(&contents[id], &tokens[..(i + 1) * BLOCK]);
                        }
                        if cache.extend(&mut table, tokens.len().div_ceil(BLOCK)).is_err() {
                            cache.truncate(&mut table, 0);
                            continue;
                        }
                        for (i, &id) in table.iter().enumerate().skip(shared) {
                            contents.insert(id, tokens[..((i + 1) * BLOCK).min(tokens.len())].to_vec());
                        }
                        cache.publish(&mut table, &tokens, shared);
                        running.push_back((tokens, table));
                    }
                    6..9 => {
                        if let Some((_, mut table)) = running.pop_front() {
                            cache.truncate(&mut table, 0);
                        }
                    }
                    _ => {
                        if let Some((_, mut table)) = running.pop_back() {
                            cache.quarantine(&mut table);
                        }
                    }
                }
                let held: HashSet<u32> = running.iter().flat_map(|(_, table)| table).copied().collect();
                prop_assert_eq!(held.len() + cache.available() + cache.quarantined(), cache.total());
                prop_assert!(cache.free.iter().all(|id| !held.contains(id)));
            }
        }
    }
}
