//! Times: 34 bits of seconds from 1901 to 2446 and 30 of nanoseconds, in two words.

use super::bytes::words;
use crate::index::Timestamp;

const EARLIEST: i64 = -0x8000_0000;
const LATEST: i64 = 0x3_7fff_ffff;

/// The base word and the extra word. Times that ext4 cannot hold become the nearest it can, without nanoseconds, as the
/// kernel has it when such a time is set.
pub(super) fn encode(time: Timestamp) -> (u32, u32) {
    let secs = time.secs.clamp(EARLIEST, LATEST);
    let nanos = if secs == EARLIEST || secs == LATEST {
        0
    } else {
        time.nanos
    };
    // The epoch bits count how many times 2^32 has to be added to the sign-extended base.
    let (base, _) = words(u64::from_le_bytes(secs.to_le_bytes()));
    let signed = i64::from(i32::from_le_bytes(base.to_le_bytes()));
    let epoch = u32::try_from((secs - signed) >> 32).expect("clamped to four epochs");
    (base, nanos << 2 | epoch)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_epoch_comes_back_by_the_kernels_rule() {
        for secs in [
            EARLIEST + 1,
            -2,
            0,
            0x7fff_ffff,
            0x8000_0000,
            0xffff_ffff,
            0x1_0000_0000,
            0x2_8000_0000,
            LATEST - 1,
        ] {
            let (base, extra) = encode(Timestamp {
                secs,
                nanos: 999_999_999,
            });
            let decoded = i64::from(i32::from_le_bytes(base.to_le_bytes())) + (i64::from(extra & 3) << 32);
            assert_eq!((decoded, extra >> 2), (secs, 999_999_999));
        }
    }

    #[test]
    fn what_does_not_fit_is_the_nearest() {
        assert_eq!(
            encode(Timestamp {
                secs: i64::MIN,
                nanos: 5
            }),
            (0x8000_0000, 0)
        );
        assert_eq!(
            encode(Timestamp {
                secs: i64::MAX,
                nanos: 5
            }),
            (0x7fff_ffff, 3)
        );
    }
}
