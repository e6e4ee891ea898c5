//! Little-endian fields at fixed places. Every offset is derived from the field before it and
//! FORMAT.md repeats them; a test compares the two.

/// Declares consecutive fields: `name: length` in bytes; defines `name` as a byte range and
/// `END` as the total.
macro_rules! layout {
    ($vis:vis mod $module:ident { $($field:ident : $len:expr),* $(,)? }) => {
        #[allow(missing_docs, non_upper_case_globals, dead_code)] // reserved fields are written as zero
        $vis mod $module {
            use core::ops::Range;
            layout!(@fields 0usize; $($field : $len),*);
            /// Name, offset and length of every field, for the test that compares with FORMAT.md.
            pub const FIELDS: &[(&str, usize, usize)] =
                &[$((stringify!($field), $field.start, $field.end - $field.start)),*];
        }
    };
    (@fields $at:expr; $field:ident : $len:expr, $($rest:tt)*) => {
        pub const $field: Range<usize> = $at..$at + $len;
        layout!(@fields $at + $len; $($rest)*);
    };
    (@fields $at:expr; $field:ident : $len:expr) => {
        pub const $field: Range<usize> = $at..$at + $len;
        pub const END: usize = $at + $len;
    };
}

layout! {
    pub(crate) mod header {
        magic: 8, version: 2, header_len: 2, flags: 4,
        volume: 16,
        generation: 8,
        prev_epoch: 8, prev_seq: 8,
        epoch: 8, first_seq: 8, last_seq: 8,
        first_time: 8, last_time: 8,
        durable_epoch: 8, durable_seq: 8,
        record_count: 4, aux_len: 4, frame_count: 4, stored_len: 4, raw_len: 4,
        reserved: 4,
        seal_key_id: 16, seal_nonce: 12, seal_reserved: 4,
        prev_chain: 32,
        chain: 32,
        padding: 20,
        crc: 4
    }
}

layout! {
    pub(crate) mod record {
        kind: 1, flags: 1, aux_len: 2, aux_off: 4,
        seq: 8, time: 8,
        offset: 8, len: 8,
        raw_off: 4, crc: 4
    }
}

layout! {
    pub(crate) mod frame {
        raw_len: 4, stored_len: 4, crc: 4, codec: 1, padding: 3
    }
}

layout! {
    pub(crate) mod segment_header {
        magic: 8, version: 2, block_len: 2, flags: 4,
        volume: 16,
        generation: 8, epoch: 8, segment: 8,
        prev_epoch: 8, prev_seq: 8, prev_chain: 32,
        created: 8,
        capacity: 8,
        volume_size: 8, block_logical: 4, block_physical: 4,
        order: 1, order_padding: 7,
        seal_key_id: 16, seal_wrapped_key: 64,
        padding: 3868,
        crc: 4
    }
}

layout! {
    pub(crate) mod segment_trailer {
        magic: 8, version: 2, reserved: 2, flags: 4,
        volume: 16, segment: 8, header_crc: 4, footer_block: 4,
        last_epoch: 8, last_seq: 8, last_chain: 32,
        min_time: 8, max_time: 8,
        batch_count: 4, event_count: 4, event_aux_len: 4, frame_count: 4, extent_count: 4,
        order: 1, order_padding: 3,
        raw_bytes: 8, stored_bytes: 8,
        volume_size: 8,
        padding: 3932,
        crc: 4
    }
}

layout! {
    pub(crate) mod footer_page {
        payload: 4080, kind: 1, reserved: 1, used: 2, segment_low: 4, index: 4, crc: 4
    }
}

layout! {
    pub(crate) mod batch_place {
        block: 4, len: 4, epoch: 8, first_seq: 8, last_seq: 8, first_time: 8, last_time: 8,
        chain: 32, first_frame: 4, frame_count: 4, front_crc: 4,
        reserved: 4
    }
}

layout! {
    pub(crate) mod event {
        epoch: 8, record: 48
    }
}

layout! {
    pub(crate) mod frame_place {
        place: 4, crc: 4, stored_less_one: 2, raw_less_one: 2, codec: 1, padding: 3
    }
}

layout! {
    pub(crate) mod index_entry {
        address_and_len: 8, frame: 4, sector_in_frame: 1, kind: 1, reserved: 2
    }
}

/// Bytes of a batch header.
pub(crate) const HEADER_LEN: usize = header::END;
/// Bytes of an entry of the record table.
pub(crate) const RECORD_LEN: usize = record::END;
/// Bytes of an entry of the frame table.
pub(crate) const FRAME_ENTRY_LEN: usize = frame::END;

const _: () = assert!(HEADER_LEN == 256 && RECORD_LEN == 48 && FRAME_ENTRY_LEN == 16);
const _: () = assert!(segment_header::END == 4096 && segment_trailer::END == 4096);
const _: () = assert!(footer_page::END == 4096 && batch_place::END == 96 && event::END == 56);
const _: () = assert!(frame_place::END == 16 && index_entry::END == 16);

/// Reads the bytes of a field. The caller has checked that `bytes` is long enough.
pub(crate) fn array<const N: usize>(bytes: &[u8], at: core::ops::Range<usize>) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at]);
    out
}

pub(crate) fn u16_at(bytes: &[u8], at: core::ops::Range<usize>) -> u16 {
    u16::from_le_bytes(array(bytes, at))
}

pub(crate) fn u32_at(bytes: &[u8], at: core::ops::Range<usize>) -> u32 {
    u32::from_le_bytes(array(bytes, at))
}

pub(crate) fn u64_at(bytes: &[u8], at: core::ops::Range<usize>) -> u64 {
    u64::from_le_bytes(array(bytes, at))
}

pub(crate) fn i64_at(bytes: &[u8], at: core::ops::Range<usize>) -> i64 {
    i64::from_le_bytes(array(bytes, at))
}

/// A length or count of a format as `usize`; formats keep them in 32 bits.
pub(crate) fn len_at(bytes: &[u8], at: core::ops::Range<usize>) -> usize {
    u32_at(bytes, at) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The rows `| offset | length | `field` |` below the heading of a layout.
    fn documented(name: &str) -> Vec<(String, usize, usize)> {
        let text = include_str!("../FORMAT.md");
        let (_, section) = text.split_once(&format!("### `{name}`\n")).unwrap();
        let section = section.split("\n#").next().unwrap();
        let row = |line: &str| {
            let mut cells = line.split('|').map(str::trim).skip(1);
            let offset = cells.next()?.parse().ok()?;
            let len = cells.next()?.parse().ok()?;
            let field = cells.next()?.strip_prefix('`')?.strip_suffix('`')?;
            Some((field.to_owned(), offset, len))
        };
        section.lines().filter_map(row).collect()
    }

    #[test]
    fn format_md_says_what_the_code_does() {
        let layouts = [
            ("header", header::FIELDS),
            ("record", record::FIELDS),
            ("frame", frame::FIELDS),
            ("segment_header", segment_header::FIELDS),
            ("segment_trailer", segment_trailer::FIELDS),
            ("footer_page", footer_page::FIELDS),
            ("batch_place", batch_place::FIELDS),
            ("event", event::FIELDS),
            ("frame_place", frame_place::FIELDS),
            ("index_entry", index_entry::FIELDS),
        ];
        for (name, fields) in layouts {
            let code: Vec<_> =
                fields.iter().map(|(f, at, len)| ((*f).to_owned(), *at, *len)).collect();
            assert_eq!(documented(name), code, "layout `{name}`");
        }
    }
}
