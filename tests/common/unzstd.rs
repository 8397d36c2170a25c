//! A zstd decoder, from RFC 8878 alone: slow, simple, and it shares no line with the program's reader of blocks. It begins at any block, with
//! what a decoder holds there, and of what came out before it knows only the bytes that it is given: copying another one is an error.

/// The last offsets and the tables that a decoder holds.
#[derive(Clone, Debug)]
pub(crate) struct Held {
    pub(crate) repeats: [usize; 3],
    pub(crate) huffman: Option<Huffman>,
    pub(crate) offsets: Option<Table>,
    pub(crate) matches: Option<Table>,
    pub(crate) literals: Option<Table>,
}

impl Default for Held {
    fn default() -> Self {
        Self {
            repeats: [1, 4, 8],
            huffman: None,
            offsets: None,
            matches: None,
            literals: None,
        }
    }
}

/// Codes of literals: for every pattern of `bits` bits a symbol and how many of them are its own.
#[derive(Clone, Debug)]
pub(crate) struct Huffman {
    bits: usize,
    codes: Vec<(u8, usize)>,
}

/// An FSE table: for every state a symbol, and where the next state begins and how many bits are added.
#[derive(Clone, Debug)]
pub(crate) struct Table {
    log: usize,
    states: Vec<(usize, usize, usize)>,
}

/// Which predefined table.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Which {
    Offsets,
    Matches,
    Literals,
}

/// A frame's header: the least window, whether a checksum follows, and where the first block is.
pub(crate) fn header(frame: &[u8]) -> (usize, bool, usize) {
    assert_eq!(frame[..4], [0x28, 0xb5, 0x2f, 0xfd]);
    let descriptor = frame[4];
    let single = descriptor & 0x20 != 0;
    let dictionary = [0, 1, 2, 4][usize::from(descriptor & 3)];
    let content = match descriptor >> 6 {
        0 => usize::from(single),
        n => 1 << n,
    };
    let first = 5 + usize::from(!single) + dictionary + content;
    let window = if single {
        number(&frame[5 + dictionary..first]) + if content == 2 { 256 } else { 0 }
    } else {
        let base = 1 << (10 + (frame[5] >> 3));
        base + base / 8 * usize::from(frame[5] & 7)
    };
    (window, descriptor & 4 != 0, first)
}

fn number(bytes: &[u8]) -> usize {
    bytes
        .iter()
        .rev()
        .fold(0, |value, byte| value << 8 | usize::from(*byte))
}

/// Decodes the block at the beginning of `bytes`. What came out so far is in `out`, as far as it is known. Returns the block's length
/// and whether it is the frame's last.
pub(crate) fn block(bytes: &[u8], held: &mut Held, out: &mut Vec<Option<u8>>) -> (usize, bool) {
    let bits = number(&bytes[..3]);
    let (last, size) = (bits & 1 == 1, bits >> 3);
    match bits >> 1 & 3 {
        0 => out.extend(bytes[3..3 + size].iter().map(|byte| Some(*byte))),
        1 => {
            out.extend(std::iter::repeat_n(Some(bytes[3]), size));
            return (4, last);
        }
        2 => compressed(&bytes[3..3 + size], held, out),
        _ => panic!("a reserved block"),
    }
    (3 + size, last)
}

fn compressed(block: &[u8], held: &mut Held, out: &mut Vec<Option<u8>>) {
    let (literals, mut rest) = literals(block, held);
    let count = match usize::from(rest[0]) {
        few @ 0..128 => (few, 1),
        some @ 128..255 => (((some - 128) << 8) + usize::from(rest[1]), 2),
        _ => (number(&rest[1..3]) + 0x7f00, 3),
    };
    rest = &rest[count.1..];
    let mut literals = literals.into_iter();
    if count.0 > 0 {
        let modes = rest[0];
        rest = &rest[1..];
        for (which, shift) in [(Which::Literals, 6), (Which::Offsets, 4), (Which::Matches, 2)] {
            let place = match which {
                Which::Offsets => &mut held.offsets,
                Which::Matches => &mut held.matches,
                Which::Literals => &mut held.literals,
            };
            match modes >> shift & 3 {
                0 => *place = Some(predefined(which)),
                1 => {
                    *place = Some(Table {
                        log: 0,
                        states: vec![(usize::from(rest[0]), 0, 0)],
                    });
                    rest = &rest[1..];
                }
                2 => {
                    let (table, used) = described(rest);
                    *place = Some(table);
                    rest = &rest[used..];
                }
                _ => assert!(place.is_some(), "no table to repeat"),
            }
        }
        sequences(rest, count.0, held, &mut literals, out);
    }
    out.extend(literals.map(Some));
}

/// The table of codes, from its description; and how long that is.
pub(crate) fn huffman(bytes: &[u8]) -> (Huffman, usize) {
    let head = usize::from(bytes[0]);
    let (mut weights, used) = if head >= 128 {
        let count = head - 127;
        let weight = |n: usize| usize::from(bytes[1 + n / 2] >> (4 - n % 2 * 4) & 15);
        ((0..count).map(weight).collect::<Vec<_>>(), 1 + count.div_ceil(2))
    } else {
        let (table, begin) = described(&bytes[1..]);
        let mut bits = Backward::new(&bytes[1 + begin..=head]);
        let mut states = [bits.take(table.log), bits.take(table.log)];
        let mut weights = Vec::new();
        for turn in [0, 1].into_iter().cycle() {
            let (symbol, next, width) = table.states[states[turn]];
            weights.push(symbol);
            if bits.left < width {
                weights.push(table.states[states[1 - turn]].0);
                break;
            }
            states[turn] = next + bits.take(width);
        }
        (weights, 1 + head)
    };
    let total: usize = weights
        .iter()
        .filter(|weight| **weight > 0)
        .map(|weight| 1 << (weight - 1))
        .sum();
    let bits = usize::try_from(total.ilog2()).unwrap() + 1;
    let left = (1_usize << bits) - total;
    assert!(left.is_power_of_two());
    weights.push(usize::try_from(left.ilog2()).unwrap() + 1);
    let mut codes = Vec::new();
    for weight in 1..=bits {
        for (symbol, _) in weights.iter().enumerate().filter(|(_, other)| **other == weight) {
            let code = (u8::try_from(symbol).unwrap(), bits + 1 - weight);
            codes.extend(std::iter::repeat_n(code, 1 << (weight - 1)));
        }
    }
    (Huffman { bits, codes }, used)
}

fn literals<'a>(block: &'a [u8], held: &mut Held) -> (Vec<u8>, &'a [u8]) {
    let (kind, format) = (block[0] & 3, block[0] >> 2 & 3);
    if kind < 2 {
        let sizes_len = match format {
            0 | 2 => 1,
            1 => 2,
            _ => 3,
        };
        let count = number(&block[..sizes_len]) >> if sizes_len == 1 { 3 } else { 4 };
        let rest = &block[sizes_len..];
        return if kind == 0 {
            (rest[..count].to_vec(), &rest[count..])
        } else {
            (vec![rest[0]; count], &rest[1..])
        };
    }
    let (sizes_len, width) = [(3, 10), (3, 10), (4, 14), (5, 18)][usize::from(format)];
    let sizes = number(&block[..sizes_len]) >> 4;
    let (count, stored) = (sizes & ((1 << width) - 1), sizes >> width);
    let (mut content, rest) = block[sizes_len..].split_at(stored);
    if kind == 2 {
        let (table, used) = huffman(content);
        held.huffman = Some(table);
        content = &content[used..];
    }
    let table = held.huffman.as_ref().expect("no codes to use again");
    let mut out = Vec::new();
    if format == 0 {
        stream(content, table, count, &mut out);
    } else {
        let each = count.div_ceil(4);
        let mut at = 6;
        for n in 0..3 {
            let len = number(&content[2 * n..2 * n + 2]);
            stream(&content[at..at + len], table, each, &mut out);
            at += len;
        }
        stream(&content[at..], table, count - 3 * each, &mut out);
    }
    (out, rest)
}

fn stream(bytes: &[u8], table: &Huffman, count: usize, out: &mut Vec<u8>) {
    let mut bits = Backward::new(bytes);
    for _ in 0..count {
        let (symbol, own) = table.codes[bits.peek(table.bits)];
        out.push(symbol);
        bits.take(own);
    }
    assert_eq!(bits.left, 0, "a stream of literals has bits left");
}

/// A stream of bits that is read from its end.
struct Backward<'a> {
    bytes: &'a [u8],
    left: usize,
}

impl<'a> Backward<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        let last = *bytes.last().expect("a stream has an end");
        let left = bytes.len() * 8 - 1 - usize::try_from(last.leading_zeros()).unwrap();
        Self { bytes, left }
    }

    /// The next bits, with zeros where there are none.
    fn peek(&self, count: usize) -> usize {
        let bit = |at: usize| usize::from(self.bytes[at / 8] >> (at % 8) & 1);
        (0..count).fold(0, |value, n| {
            value << 1 | if n < self.left { bit(self.left - 1 - n) } else { 0 }
        })
    }

    fn take(&mut self, count: usize) -> usize {
        let value = self.peek(count);
        self.left = self.left.checked_sub(count).expect("a stream is too short");
        value
    }
}

/// The table that a description is of, and how long it is.
pub(crate) fn described(bytes: &[u8]) -> (Table, usize) {
    let bit = |at: usize| usize::from(bytes.get(at / 8).map_or(0, |byte| byte >> (at % 8) & 1));
    let peek = |at: usize, count: usize| (0..count).fold(0, |value, n| value | bit(at + n) << n);
    let log = peek(0, 4) + 5;
    let (mut at, mut left) = (4, 1_i64 << log);
    let mut counts = Vec::new();
    while left > 0 {
        // A number between 0 and what is left and one, in as few bits as that takes, and one fewer for the first ones.
        let most = usize::try_from(left + 1).unwrap();
        let width = usize::try_from((most + 1).next_power_of_two().ilog2()).unwrap();
        let short = (1 << width) - 1 - most;
        let low = peek(at, width - 1);
        let value = if low < short {
            at += width - 1;
            low
        } else {
            let value = peek(at, width);
            at += width;
            if value >= 1 << (width - 1) {
                value - short
            } else {
                value
            }
        };
        let count = i64::try_from(value).unwrap() - 1;
        counts.push(count);
        left -= count.abs();
        // Behind a count of zero it is said how many more there are, up to three at a time.
        let mut zeros = if count == 0 { 3 } else { 0 };
        while zeros == 3 {
            zeros = peek(at, 2);
            at += 2;
            counts.extend(std::iter::repeat_n(0, zeros));
        }
    }
    assert_eq!(left, 0);
    (spread(log, &counts), at.div_ceil(8))
}

fn spread(log: usize, counts: &[i64]) -> Table {
    let size = 1_usize << log;
    let mut symbols = vec![usize::MAX; size];
    let mut high = size;
    for (symbol, _) in counts.iter().enumerate().filter(|(_, count)| **count == -1) {
        high -= 1;
        symbols[high] = symbol;
    }
    let mut at = 0;
    for (symbol, count) in counts.iter().enumerate() {
        for _ in 0..(*count).max(0) {
            symbols[at] = symbol;
            loop {
                at = (at + (size >> 1) + (size >> 3) + 3) % size;
                if at < high {
                    break;
                }
            }
        }
    }
    let mut next: Vec<usize> = counts
        .iter()
        .map(|count| usize::try_from(count.abs()).unwrap())
        .collect();
    let state = |symbol: usize| {
        let number = next[symbol];
        next[symbol] += 1;
        let width = log - usize::try_from(number.ilog2()).unwrap();
        (symbol, (number << width) - size, width)
    };
    Table {
        log,
        states: symbols.into_iter().map(state).collect(),
    }
}

pub(crate) fn predefined(which: Which) -> Table {
    let runs: &[(i64, usize)] = match which {
        Which::Literals => &[(4, 1), (3, 1), (2, 11), (1, 3), (2, 9), (3, 1), (2, 1), (1, 5), (-1, 4)],
        Which::Matches => &[(1, 1), (4, 1), (3, 1), (2, 6), (1, 37), (-1, 7)],
        Which::Offsets => &[(1, 6), (2, 3), (1, 15), (-1, 5)],
    };
    let counts: Vec<i64> = runs.iter().flat_map(|(count, times)| vec![*count; *times]).collect();
    let log = if matches!(which, Which::Offsets) { 5 } else { 6 };
    spread(log, &counts)
}

/// What a code of a length stands for: the lengths of `single` codes follow each other from `least` on, then come more at a time.
fn length(code: usize, least: usize, single: usize, wider: &[usize], bits: &mut Backward<'_>) -> usize {
    let Some(further) = code.checked_sub(single) else {
        return code + least;
    };
    let base: usize = wider[..further].iter().map(|width| 1 << width).sum();
    least + single + base + bits.take(wider[further])
}

/// How many bits the codes of lengths from the first that takes any on have.
const MATCHES: [usize; 21] = [1, 1, 1, 1, 2, 2, 3, 3, 4, 4, 5, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16];

/// How many bits the codes of lengths from the first that takes any on have.
const LITERALS: [usize; 20] = [1, 1, 1, 1, 2, 2, 3, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16];

fn sequences(
    bytes: &[u8],
    count: usize,
    held: &mut Held,
    literals: &mut std::vec::IntoIter<u8>,
    out: &mut Vec<Option<u8>>,
) {
    let table = |table: &Option<Table>| table.clone().expect("a table");
    let (offsets, matches, lengths) = (table(&held.offsets), table(&held.matches), table(&held.literals));
    let mut bits = Backward::new(bytes);
    let (mut length_at, mut offset_at) = (bits.take(lengths.log), bits.take(offsets.log));
    let mut match_at = bits.take(matches.log);
    for n in 0..count {
        let code = offsets.states[offset_at].0;
        let value = (1 << code) + bits.take(code);
        let match_len = length(matches.states[match_at].0, 3, 32, &MATCHES, &mut bits);
        let literals_len = length(lengths.states[length_at].0, 0, 16, &LITERALS, &mut bits);
        if n + 1 < count {
            let (_, next, width) = lengths.states[length_at];
            length_at = next + bits.take(width);
            let (_, next, width) = matches.states[match_at];
            match_at = next + bits.take(width);
            let (_, next, width) = offsets.states[offset_at];
            offset_at = next + bits.take(width);
        }
        let repeats = &mut held.repeats;
        let distance = if value > 3 {
            repeats.rotate_right(1);
            repeats[0] = value - 3;
            repeats[0]
        } else {
            match value - usize::from(literals_len > 0) {
                0 => repeats[0],
                which @ (1 | 2) => {
                    repeats[..=which].rotate_right(1);
                    repeats[0]
                }
                _ => {
                    repeats.rotate_right(1);
                    repeats[0] = repeats[1] - 1;
                    repeats[0]
                }
            }
        };
        out.extend(literals.by_ref().take(literals_len).map(Some));
        let from = out
            .len()
            .checked_sub(distance)
            .expect("a match from before the beginning");
        for at in from..from + match_len {
            assert!(out[at].is_some(), "byte {at} is copied and not known");
            out.push(out[at]);
        }
    }
    assert_eq!(bits.left, 0, "the sequences have bits left");
}
