//! Hash trees of big directories: the hash, and the index blocks that lead from a hash to a leaf.
//!
//! The hash is ext4's half MD4 over unsigned bytes (`fs/ext4/hash.c`), seeded with the image's UUID. Block 0 of the
//! directory is the root; with more than 508 leaves, a level of inner nodes stands behind it; leaves come last.

use super::bytes::{halves, put_u16, put_u32};
use crate::units::to_usize;

/// Index entries of the root block.
pub(super) const ROOT_ENTRIES: u32 = 508;
/// Index entries of an inner node.
pub(super) const NODE_ENTRIES: u32 = 511;
/// The most leaves that two levels reach. More would need `large_dir`; such a directory stays linear.
pub(super) const LEAVES_MAX: u32 = ROOT_ENTRIES * NODE_ENTRIES;

const HALF_MD4: u8 = 1;

/// The seed of an image's directory hashes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seed([u32; 4]);

impl Seed {
    pub(super) fn of(uuid: [u8; 16]) -> Self {
        let mut seed = [0; 4];
        for (word, bytes) in seed.iter_mut().zip(uuid.chunks_exact(4)) {
            *word = u32::from_le_bytes(bytes.try_into().expect("four bytes"));
        }
        // All zeros means that there is no seed.
        Self(if seed == [0; 4] {
            [0x6745_2301, 0xefcd_ab89, 0x98ba_dcfe, 0x1032_5476]
        } else {
            seed
        })
    }

    /// The hash of a name (its lowest bit clear) and the minor hash that orders equal ones.
    pub(super) fn hash(self, name: &[u8]) -> (u32, u32) {
        let mut state = self.0;
        for start in (0..name.len()).step_by(32) {
            half_md4(&mut state, &words(&name[start..]));
        }
        let hash = state[1] & !1;
        // The kernel keeps the highest value for the end of a directory.
        (if hash == 0xffff_fffe { 0xffff_fffc } else { hash }, state[2])
    }
}

/// The next 32 bytes of a name as eight words, padded with its remaining length.
fn words(name: &[u8]) -> [u32; 8] {
    let len = u32::try_from(name.len()).expect("a name has 255 bytes");
    let pad = (len | len << 8) & 0xffff;
    let pad = pad | pad << 16;
    let mut words = [pad; 8];
    for (word, bytes) in words.iter_mut().zip(name.chunks(4)) {
        *word = bytes
            .iter()
            .fold(pad, |word, &byte| u32::from(byte).wrapping_add(word << 8));
    }
    words
}

fn half_md4(state: &mut [u32; 4], input: &[u32; 8]) {
    type Mix = fn(u32, u32, u32) -> u32;
    let rounds: [(Mix, u32, [usize; 8], [u32; 4]); 3] = [
        (|x, y, z| z ^ (x & (y ^ z)), 0, [0, 1, 2, 3, 4, 5, 6, 7], [3, 7, 11, 19]),
        (
            |x, y, z| (x & y).wrapping_add((x ^ y) & z),
            0x5a82_7999,
            [1, 3, 5, 7, 0, 2, 4, 6],
            [3, 5, 9, 13],
        ),
        (
            |x, y, z| x ^ y ^ z,
            0x6ed9_eba1,
            [3, 7, 2, 6, 1, 5, 0, 4],
            [3, 9, 11, 15],
        ),
    ];
    let [mut a, mut b, mut c, mut d] = *state;
    for (mix, constant, order, shifts) in rounds {
        for (step, &word) in order.iter().enumerate() {
            let sum = a
                .wrapping_add(mix(b, c, d))
                .wrapping_add(input[word])
                .wrapping_add(constant);
            (a, b, c, d) = (d, sum.rotate_left(shifts[step % 4]), b, c);
        }
    }
    for (word, add) in state.iter_mut().zip([a, b, c, d]) {
        *word = word.wrapping_add(add);
    }
}

/// How many inner nodes stand between the root and so many leaves.
pub(super) const fn inner_nodes(leaves: u32) -> u32 {
    if leaves <= ROOT_ENTRIES {
        0
    } else {
        leaves.div_ceil(NODE_ENTRIES)
    }
}

/// Writes the index part of the root block, behind its `.` and `..`. `hashes` has the lowest hash of each leaf.
pub(super) fn write_root(hashes: &[u32], block: &mut [u8]) {
    let leaves = u32::try_from(hashes.len()).expect("counted in 32 bits");
    let inner = inner_nodes(leaves);
    block[28] = HALF_MD4;
    block[29] = 8; // length of this information
    block[30] = u8::from(inner > 0);
    if inner == 0 {
        write_entries(hashes.iter().copied(), 1, ROOT_ENTRIES, &mut block[32..]);
    } else {
        let firsts = hashes.iter().copied().step_by(to_usize(NODE_ENTRIES));
        write_entries(firsts, 1, ROOT_ENTRIES, &mut block[32..]);
    }
}

/// Writes inner node `number`.
pub(super) fn write_inner(hashes: &[u32], number: u32, block: &mut [u8]) {
    let leaves = u32::try_from(hashes.len()).expect("counted in 32 bits");
    put_u16(block, 4, 4096); // one unused name that spans the block
    let first = number * NODE_ENTRIES;
    let last = leaves.min(first + NODE_ENTRIES);
    let first_leaf_block = 1 + inner_nodes(leaves);
    let hashes = hashes[to_usize(first)..to_usize(last)].iter().copied();
    write_entries(hashes, first_leaf_block + first, NODE_ENTRIES, &mut block[8..]);
}

/// Index entries: a hash and a block of the directory each, the blocks counted on from `first_block`. The first entry has
/// no hash; limit and count stand in its place.
fn write_entries(hashes: impl ExactSizeIterator<Item = u32>, first_block: u32, limit: u32, out: &mut [u8]) {
    let count = u32::try_from(hashes.len()).expect("508 or 511 fit a block");
    for (at, (hash, block)) in hashes.zip(first_block..).enumerate() {
        put_u32(out, at * 8, hash);
        put_u32(out, at * 8 + 4, block);
    }
    put_u16(out, 0, halves(limit).0);
    put_u16(out, 2, halves(count).0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_are_those_of_debugfs() {
        // debugfs -R 'dx_hash -h half_md4 -s 12345678-9abc-def0-0123-456789abcdef NAME'
        let seed = Seed::of([
            0x12, 0x34, 0x56, 0x78, 0x9a, 0xbc, 0xde, 0xf0, 1, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef,
        ]);
        for (name, hash, minor) in [
            ("a", 0xece8_e9e2, 0xa05f_5320),
            ("hello.txt", 0xc3c9_9ad8, 0x16ba_b7b3),
            ("abcdefgh", 0x89b0_1b76, 0x1632_67a6),
            (&"n".repeat(33), 0x0628_02f4, 0x5820_db98),
            (&"x".repeat(255), 0xd408_5b48, 0xa168_498c),
        ] {
            assert_eq!(seed.hash(name.as_bytes()), (hash, minor), "{name}");
        }
    }
}
