//! Records: what happened to the volume, each with its sequence number and capture time.

use farshore_extent::{
    BlockSizes, Extent, GroupId, MarkerId, PointKind, SECTOR, Seq, VolumeSize, WallTime,
};

use crate::layout::{RECORD_LEN, array, i64_at, len_at, record, u16_at, u32_at, u64_at};
use crate::limits::{MAX_DATALESS_LEN, MAX_MARKER_NAME, MAX_RECORD_PAYLOAD};

/// One decoded entry of the change log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Its number. Several records of one batch may share it (a write whose zeroes were cut out).
    pub seq: Seq,
    /// When it was captured; a label.
    pub time: WallTime,
    /// What happened.
    pub body: RecordBody,
}

/// Where the payload of a record lies in the raw stream of its batch, and its checksum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PayloadRef {
    /// Offset in the batch's raw stream.
    pub raw_off: u32,
    /// crc32c of the raw payload, made from the private buffer that fed the backing write.
    pub crc: u32,
}

/// What a record says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RecordBody {
    /// The guest wrote these bytes.
    Write {
        /// Where.
        extent: Extent,
        /// The bytes.
        payload: PayloadRef,
    },
    /// These bytes read as zero: written as zeroes, discarded, or found zero while copying.
    Zero {
        /// Where.
        extent: Extent,
        /// Made by the copy loop, not by the guest.
        copied: bool,
    },
    /// A write failed on the backing device: the content is old, new or a mix until a later
    /// record covers it.
    Unknown {
        /// Where.
        extent: Extent,
    },
    /// The copy loop read these bytes under the shared range lock.
    Copy {
        /// Where.
        extent: Extent,
        /// The bytes.
        payload: PayloadRef,
    },
    /// Digest of the source's content at this number; the target compares its own.
    Hash {
        /// Over what.
        extent: Extent,
        /// Resync asks for what differs; verify reports it.
        purpose: HashPurpose,
        /// BLAKE3 of the content.
        digest: [u8; 32],
    },
    /// Names a cut.
    Marker(Marker),
    /// The pending marker became a point.
    MarkerCommit(MarkerId),
    /// The pending marker will never be a point.
    MarkerAbort(MarkerId),
    /// From this number on writes are missing; no point until [`RecordBody::OrderRestored`].
    OrderLost,
    /// Everything has been sent again; points are possible from here.
    OrderRestored,
    /// The volume has a new size.
    Resize(VolumeSize),
    /// First record of a volume in an epoch.
    EpochStart(EpochStart),
}

/// Why a digest was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HashPurpose {
    /// Send what differs.
    Resync,
    /// Report what differs.
    Verify,
}

/// Whether a marker is a point already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MarkerState {
    /// Waits for [`RecordBody::MarkerCommit`]; never a point without it.
    Pending,
    /// A point as it stands (one host: every place is consistent).
    Committed,
}

/// A marker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Marker {
    /// Its identity; the same in all streams of a group.
    pub id: MarkerId,
    /// What the point will promise.
    pub kind: PointKind,
    /// Pending or committed.
    pub state: MarkerState,
    /// The group, or [`GroupId::NIL`].
    pub group: GroupId,
    /// Name tag, at most 255 bytes; empty for points cut by the policy.
    pub name: String,
}

/// How an epoch begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EpochStart {
    /// True after a clean stop with nothing left to send: the history goes on without a gap.
    /// False: order is lost from here until [`RecordBody::OrderRestored`].
    pub continues: bool,
    /// Size of the volume now.
    pub size: VolumeSize,
    /// Its block sizes.
    pub blocks: BlockSizes,
}

/// Why the bytes of a record are impossible.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// Unknown kind: written by a newer version, or damaged.
    #[error("record kind {0} is unknown")]
    Kind(u8),
    /// A field has a value that no writer produces.
    #[error("record field {0} is impossible")]
    Field(&'static str),
}

mod kind {
    pub(super) const WRITE: u8 = 1;
    pub(super) const ZERO: u8 = 2;
    pub(super) const UNKNOWN: u8 = 3;
    pub(super) const COPY: u8 = 4;
    pub(super) const HASH: u8 = 5;
    pub(super) const MARKER: u8 = 6;
    pub(super) const MARKER_COMMIT: u8 = 7;
    pub(super) const MARKER_ABORT: u8 = 8;
    pub(super) const ORDER_LOST: u8 = 9;
    pub(super) const ORDER_RESTORED: u8 = 10;
    pub(super) const RESIZE: u8 = 11;
    pub(super) const EPOCH_START: u8 = 12;
}

/// Bit 0 of the flags: copied (zero), verify (hash), committed (marker), continues (epoch start).
const FLAG: u8 = 1;

impl RecordBody {
    /// The range it concerns, if it has one.
    #[must_use]
    pub const fn extent(&self) -> Option<Extent> {
        match self {
            Self::Write { extent, .. }
            | Self::Zero { extent, .. }
            | Self::Unknown { extent }
            | Self::Copy { extent, .. }
            | Self::Hash { extent, .. } => Some(*extent),
            Self::Marker(_)
            | Self::MarkerCommit(_)
            | Self::MarkerAbort(_)
            | Self::OrderLost
            | Self::OrderRestored
            | Self::Resize(_)
            | Self::EpochStart(_) => None,
        }
    }

    /// Where its payload lies, if it has one.
    #[must_use]
    pub const fn payload(&self) -> Option<PayloadRef> {
        match self {
            Self::Write { payload, .. } | Self::Copy { payload, .. } => Some(*payload),
            _ => None,
        }
    }

    const fn kind(&self) -> u8 {
        match self {
            Self::Write { .. } => kind::WRITE,
            Self::Zero { .. } => kind::ZERO,
            Self::Unknown { .. } => kind::UNKNOWN,
            Self::Copy { .. } => kind::COPY,
            Self::Hash { .. } => kind::HASH,
            Self::Marker(_) => kind::MARKER,
            Self::MarkerCommit(_) => kind::MARKER_COMMIT,
            Self::MarkerAbort(_) => kind::MARKER_ABORT,
            Self::OrderLost => kind::ORDER_LOST,
            Self::OrderRestored => kind::ORDER_RESTORED,
            Self::Resize(_) => kind::RESIZE,
            Self::EpochStart(_) => kind::EPOCH_START,
        }
    }

    fn flag(&self) -> bool {
        match self {
            Self::Zero { copied, .. } => *copied,
            Self::Hash { purpose, .. } => *purpose == HashPurpose::Verify,
            Self::Marker(marker) => marker.state == MarkerState::Committed,
            Self::EpochStart(start) => start.continues,
            Self::Write { .. }
            | Self::Unknown { .. }
            | Self::Copy { .. }
            | Self::MarkerCommit(_)
            | Self::MarkerAbort(_)
            | Self::OrderLost
            | Self::OrderRestored
            | Self::Resize(_) => false,
        }
    }

    fn push_aux(&self, aux: &mut Vec<u8>) {
        match self {
            Self::Hash { digest, .. } => aux.extend_from_slice(digest),
            Self::Marker(marker) => {
                aux.extend_from_slice(&marker.id.to_bytes());
                aux.extend_from_slice(&marker.group.to_bytes());
                aux.push(point_kind_byte(marker.kind));
                aux.extend_from_slice(marker.name.as_bytes());
            }
            Self::MarkerCommit(id) | Self::MarkerAbort(id) => {
                aux.extend_from_slice(&id.to_bytes());
            }
            Self::Resize(size) => aux.extend_from_slice(&size.get().to_le_bytes()),
            Self::EpochStart(start) => {
                aux.extend_from_slice(&start.size.get().to_le_bytes());
                aux.extend_from_slice(&start.blocks.logical().to_le_bytes());
                aux.extend_from_slice(&start.blocks.physical().to_le_bytes());
            }
            Self::Write { .. }
            | Self::Zero { .. }
            | Self::Unknown { .. }
            | Self::Copy { .. }
            | Self::OrderLost
            | Self::OrderRestored => {}
        }
    }
}

const fn point_kind_byte(kind: PointKind) -> u8 {
    match kind {
        PointKind::Crash => 0,
        PointKind::App => 1,
        PointKind::Group => 2,
    }
}

impl Record {
    /// Appends the 48-byte entry to `table` and its auxiliary bytes to `aux`.
    pub(crate) fn encode(&self, table: &mut Vec<u8>, aux: &mut Vec<u8>) {
        let aux_off = aux.len();
        self.body.push_aux(aux);
        let mut out = [0u8; RECORD_LEN];
        out[record::kind][0] = self.body.kind();
        out[record::flags][0] = u8::from(self.body.flag()) * FLAG;
        let aux_len = u16::try_from(aux.len() - aux_off).unwrap_or(u16::MAX);
        out[record::aux_len].copy_from_slice(&aux_len.to_le_bytes());
        let aux_off = if aux_len == 0 { 0 } else { u32::try_from(aux_off).unwrap_or(u32::MAX) };
        out[record::aux_off].copy_from_slice(&aux_off.to_le_bytes());
        out[record::seq].copy_from_slice(&self.seq.get().to_le_bytes());
        out[record::time].copy_from_slice(&self.time.nanos().to_le_bytes());
        if let Some(extent) = self.body.extent() {
            out[record::offset].copy_from_slice(&extent.offset().to_le_bytes());
            out[record::len].copy_from_slice(&extent.len().to_le_bytes());
        }
        if let Some(payload) = self.body.payload() {
            out[record::raw_off].copy_from_slice(&payload.raw_off.to_le_bytes());
            out[record::crc].copy_from_slice(&payload.crc.to_le_bytes());
        }
        table.extend_from_slice(&out);
    }

    /// Decodes one entry; `aux` is the whole auxiliary area of the batch and `raw_len` the length
    /// of its raw stream.
    pub(crate) fn decode(
        entry: &[u8; RECORD_LEN],
        aux: &[u8],
        raw_len: usize,
    ) -> Result<Self, RecordError> {
        let flags = entry[record::flags][0];
        if flags & !FLAG != 0 {
            return Err(RecordError::Field("flags"));
        }
        let aux_len = usize::from(u16_at(entry, record::aux_len));
        let aux_off = len_at(entry, record::aux_off);
        let aux = aux
            .get(aux_off..)
            .and_then(|rest| rest.get(..aux_len))
            .ok_or(RecordError::Field("auxiliary data"))?;
        let fields = Fields { entry, aux, flag: flags & FLAG != 0, raw_len };
        Ok(Self {
            seq: Seq::new(u64_at(entry, record::seq)),
            time: WallTime::from_nanos(i64_at(entry, record::time)),
            body: fields.body()?,
        })
    }
}

/// The parts of an entry while it is being decoded.
struct Fields<'a> {
    entry: &'a [u8; RECORD_LEN],
    aux: &'a [u8],
    flag: bool,
    raw_len: usize,
}

impl Fields<'_> {
    fn body(&self) -> Result<RecordBody, RecordError> {
        let body = match self.entry[record::kind][0] {
            kind::WRITE => {
                let (extent, payload) = self.data()?;
                RecordBody::Write { extent, payload }
            }
            kind::COPY => {
                let (extent, payload) = self.data()?;
                RecordBody::Copy { extent, payload }
            }
            kind::ZERO => RecordBody::Zero { extent: self.dataless()?, copied: self.flag },
            kind::UNKNOWN => RecordBody::Unknown { extent: self.dataless()? },
            kind::HASH => {
                let digest = self.aux.try_into().map_err(|_| RecordError::Field("digest"))?;
                let purpose = if self.flag { HashPurpose::Verify } else { HashPurpose::Resync };
                RecordBody::Hash { extent: self.dataless()?, purpose, digest }
            }
            kind::MARKER => RecordBody::Marker(self.marker()?),
            kind::MARKER_COMMIT => RecordBody::MarkerCommit(self.marker_id()?),
            kind::MARKER_ABORT => RecordBody::MarkerAbort(self.marker_id()?),
            kind::ORDER_LOST => RecordBody::OrderLost,
            kind::ORDER_RESTORED => RecordBody::OrderRestored,
            kind::RESIZE => RecordBody::Resize(self.size(8)?),
            kind::EPOCH_START => RecordBody::EpochStart(self.epoch_start()?),
            unknown => return Err(RecordError::Kind(unknown)),
        };
        let expects_aux = matches!(
            body,
            RecordBody::Hash { .. }
                | RecordBody::Marker(_)
                | RecordBody::MarkerCommit(_)
                | RecordBody::MarkerAbort(_)
                | RecordBody::Resize(_)
                | RecordBody::EpochStart(_)
        );
        if !expects_aux && !self.aux.is_empty() {
            return Err(RecordError::Field("auxiliary data"));
        }
        if self.flag && !Self::knows_flag(&body) {
            return Err(RecordError::Field("flags"));
        }
        Ok(body)
    }

    const fn knows_flag(body: &RecordBody) -> bool {
        matches!(
            body,
            RecordBody::Zero { .. }
                | RecordBody::Hash { .. }
                | RecordBody::Marker(_)
                | RecordBody::EpochStart(_)
        )
    }

    fn extent(&self, max: u64) -> Result<Extent, RecordError> {
        let offset = u64_at(self.entry, record::offset);
        let len = u64_at(self.entry, record::len);
        let extent = Extent::new(offset, len).map_err(|_| RecordError::Field("extent"))?;
        if len > max || !extent.is_aligned_to(SECTOR) {
            return Err(RecordError::Field("extent"));
        }
        Ok(extent)
    }

    fn dataless(&self) -> Result<Extent, RecordError> {
        self.extent(MAX_DATALESS_LEN)
    }

    fn data(&self) -> Result<(Extent, PayloadRef), RecordError> {
        let extent = self.extent(MAX_RECORD_PAYLOAD as u64)?;
        let raw_off = u32_at(self.entry, record::raw_off);
        let end = u64::from(raw_off) + extent.len();
        // An index counts payload in sectors, so a payload that begins within one is refused here.
        if end > self.raw_len as u64 || !u64::from(raw_off).is_multiple_of(SECTOR) {
            return Err(RecordError::Field("payload place"));
        }
        Ok((extent, PayloadRef { raw_off, crc: u32_at(self.entry, record::crc) }))
    }

    fn marker_id(&self) -> Result<MarkerId, RecordError> {
        let bytes: [u8; 16] = self.aux.try_into().map_err(|_| RecordError::Field("marker id"))?;
        Ok(MarkerId::from_bytes(bytes))
    }

    fn marker(&self) -> Result<Marker, RecordError> {
        if self.aux.len() < 33 || self.aux.len() > 33 + MAX_MARKER_NAME {
            return Err(RecordError::Field("marker"));
        }
        let kind = match self.aux[32] {
            0 => PointKind::Crash,
            1 => PointKind::App,
            2 => PointKind::Group,
            _ => return Err(RecordError::Field("point kind")),
        };
        let name =
            core::str::from_utf8(&self.aux[33..]).map_err(|_| RecordError::Field("marker name"))?;
        Ok(Marker {
            id: MarkerId::from_bytes(array(self.aux, 0..16)),
            kind,
            state: if self.flag { MarkerState::Committed } else { MarkerState::Pending },
            group: GroupId::from_bytes(array(self.aux, 16..32)),
            name: name.to_owned(),
        })
    }

    fn size(&self, aux_len: usize) -> Result<VolumeSize, RecordError> {
        if self.aux.len() != aux_len {
            return Err(RecordError::Field("auxiliary data"));
        }
        VolumeSize::new(u64_at(self.aux, 0..8)).map_err(|_| RecordError::Field("volume size"))
    }

    fn epoch_start(&self) -> Result<EpochStart, RecordError> {
        let size = self.size(16)?;
        let blocks = BlockSizes::new(u32_at(self.aux, 8..12), u32_at(self.aux, 12..16))
            .map_err(|_| RecordError::Field("block sizes"))?;
        Ok(EpochStart { continues: self.flag, size, blocks })
    }
}
