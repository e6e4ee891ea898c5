//! Records in memory behind the control socket of `filterd`.

use std::collections::BTreeMap;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use farshore_blkfilter::control::{
    Attachment, BackendKind, CopyProgress, Descriptor, DescriptorBody, Fetched, MarkerPlaced,
    MarkerRequest, PoolPlace, Reply, Request, VerifyProgress, VolumeInfo, VolumeStatus,
};
use farshore_blkfilter::sys::fdpass::send_with_fd;
use farshore_blkfilter::sys::pool::{PoolMemory, PoolSlice};
use farshore_changelog::codec::{encode, read_message};
use farshore_extent::{
    BlockSizes, CaptureOrder, Epoch, Extent, Lsn, Problem, Seq, VolumeId, VolumeName, VolumeSize,
    WallTime,
};

pub struct Volume {
    pub info: VolumeInfo,
    pub records: Vec<Descriptor>,
    pub released: Lsn,
    pub recopies: u32,
    pub order: CaptureOrder,
    pool: Arc<PoolMemory>,
    slices: Vec<PoolSlice>,
}

pub struct State {
    pub volumes: BTreeMap<VolumeId, Volume>,
    pub markers: Vec<MarkerRequest>,
    pub next: u64,
    pub epoch: Epoch,
    connections: Vec<UnixStream>,
}

#[derive(Clone)]
pub struct FakeFilterd {
    state: Arc<(Mutex<State>, Condvar)>,
}

impl FakeFilterd {
    pub fn serve(socket: &Path) -> Self {
        std::fs::create_dir_all(socket.parent().unwrap()).unwrap();
        let listener = UnixListener::bind(socket).unwrap();
        let state = State {
            volumes: BTreeMap::new(),
            markers: Vec::new(),
            next: 0,
            epoch: Epoch::new(7),
            connections: Vec::new(),
        };
        let this = Self { state: Arc::new((Mutex::new(state), Condvar::new())) };
        let shared = this.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                shared.with(|s| s.connections.push(stream.try_clone().unwrap()));
                let shared = shared.clone();
                std::thread::spawn(move || shared.connection(stream));
            }
        });
        this
    }

    pub fn with<T>(&self, act: impl FnOnce(&mut State) -> T) -> T {
        let result = act(&mut self.state.0.lock().unwrap());
        self.state.1.notify_all();
        result
    }

    pub fn protect(&self, name: &str) -> VolumeId {
        let volume = VolumeId::random();
        self.with(|s| {
            let info = VolumeInfo {
                volume,
                name: VolumeName::new(name).unwrap(),
                backing: "/dev/null".into(),
                backend: BackendKind::File,
                size: VolumeSize::new(1 << 30).unwrap(),
                blocks: BlockSizes::E512,
                attachment: Attachment::Socket { path: "none".into() },
                link: None,
                epoch: s.epoch,
                point_interval_ms: None,
            };
            let entry = Volume {
                info,
                records: Vec::new(),
                released: Lsn::new(s.epoch, Seq::ZERO),
                recopies: 0,
                order: CaptureOrder::Ordered,
                pool: PoolMemory::shared(32 << 20).unwrap(),
                slices: Vec::new(),
            };
            s.volumes.insert(volume, entry);
        });
        volume
    }

    pub fn write(&self, volume: VolumeId, offset: u64, data: &[u8]) -> Seq {
        self.with(|s| {
            let v = s.volumes.get_mut(&volume).unwrap();
            let mut slice = v.pool.reserve(u32::try_from(data.len()).unwrap()).unwrap();
            slice.bytes_mut()[..data.len()].copy_from_slice(data);
            let place = PoolPlace { offset: slice.offset(), crc: crc32c::crc32c(data) };
            v.slices.push(slice);
            let extent = Extent::new(offset, data.len() as u64).unwrap();
            s.append(volume, DescriptorBody::Write { extent, place })
        })
    }

    /// Memory fails: the bytes of the newest write change after their checksum was made.
    pub fn damage_newest(&self, volume: VolumeId) {
        self.with(|s| {
            let v = s.volumes.get_mut(&volume).unwrap();
            v.slices.last_mut().unwrap().bytes_mut()[17] ^= 4;
        });
    }

    /// `filterd` is restarted uncleanly: connections break, a new epoch begins.
    pub fn restart(&self) {
        self.with(|s| {
            s.connections.drain(..).for_each(|c| drop(c.shutdown(std::net::Shutdown::Both)));
            s.epoch = s.epoch.next();
            s.next = 0;
            let ids: Vec<VolumeId> = s.volumes.keys().copied().collect();
            for id in ids {
                let epoch = s.epoch;
                let v = s.volumes.get_mut(&id).unwrap();
                v.info.epoch = epoch;
                v.records.clear();
                v.slices.clear();
                v.pool = PoolMemory::shared(32 << 20).unwrap();
                v.released = Lsn::new(epoch, Seq::ZERO);
                let (size, blocks) = (v.info.size, v.info.blocks);
                s.append(id, DescriptorBody::EpochStart { continues: false, size, blocks });
            }
        });
    }

    fn connection(&self, mut stream: UnixStream) {
        while let Ok(request) = read_message::<Request>(&mut stream) {
            let reply = self.answer(request, &stream);
            let Some(reply) = reply else { continue };
            let body = encode(&reply).unwrap();
            let mut framed = u32::try_from(body.len()).unwrap().to_le_bytes().to_vec();
            framed.extend(body);
            if stream.write_all(&framed).is_err() {
                return;
            }
        }
    }

    fn answer(&self, request: Request, stream: &UnixStream) -> Option<Result<Reply, Problem>> {
        let gone = || Problem::harmless(2001, "no such volume", "test", "-");
        Some(match request {
            Request::List => Ok(Reply::Volumes(self.with(|s| s.list()))),
            Request::Recorded => Ok(Reply::Recorded(self.with(|s| s.recorded()))),
            Request::OpenPool { volume } => {
                let pool = self.with(|s| s.volumes[&volume].pool.clone());
                let reply: Result<Reply, Problem> = Ok(Reply::Pool { len: pool.capacity() });
                let body = encode(&reply).unwrap();
                let mut framed = u32::try_from(body.len()).unwrap().to_le_bytes().to_vec();
                framed.extend(body);
                let fd = pool.read_only_fd().unwrap();
                send_with_fd(stream, &framed, fd.as_fd()).unwrap();
                return None;
            }
            Request::Fetch { volume, after, idle_ms, .. } => {
                let (lock, changed) = &*self.state;
                let nothing = |s: &mut State| {
                    s.volumes.get(&volume).is_some_and(|v| v.after(s.epoch, after).is_empty())
                };
                let wait = Duration::from_millis(u64::from(idle_ms));
                let guard = lock.lock().unwrap();
                let (state, _) = changed.wait_timeout_while(guard, wait, nothing).unwrap();
                match state.volumes.get(&volume) {
                    Some(v) => Ok(Reply::Fetched(Fetched {
                        epoch: state.epoch,
                        records: v.after(state.epoch, after),
                        more: false,
                    })),
                    None => Err(gone()),
                }
            }
            Request::Spooled { .. } => panic!("this agent has no spool"),
            Request::Release { volume, upto } => self.with(|s| {
                let v = s.volumes.get_mut(&volume).ok_or_else(gone)?;
                if upto.epoch == v.info.epoch {
                    assert!(upto.seq.get() <= s.next, "released what was never captured");
                    v.released = v.released.max(upto);
                }
                Ok(Reply::Done)
            }),
            Request::Marker(request) => self.with(|s| {
                let lsn = Lsn::new(s.epoch, Seq::new(s.next + 1));
                s.next += 1;
                for volume in &request.volumes {
                    let MarkerRequest { marker, kind, group, name, pending, .. } = request.clone();
                    let body = DescriptorBody::Marker { marker, kind, group, name, pending };
                    let seq = lsn.seq;
                    let v = s.volumes.get_mut(volume).unwrap();
                    v.records.push(Descriptor { seq, time: WallTime::now(), body });
                }
                s.markers.push(request.clone());
                Ok(Reply::Marker(MarkerPlaced {
                    lsn,
                    time: WallTime::now(),
                    volumes: request.volumes,
                    not_ordered: Vec::new(),
                }))
            }),
            Request::Recopy { volume, .. } => self.with(|s| {
                let v = s.volumes.get_mut(&volume).ok_or_else(gone)?;
                v.recopies += 1;
                v.records.clear();
                s.append(volume, DescriptorBody::OrderLost);
                Ok(Reply::Done)
            }),
            Request::Compared { .. } | Request::Fence { fence: None, .. } => Ok(Reply::Done),
            other => panic!("the agent has no business with {other:?}"),
        })
    }
}

impl State {
    pub fn append(&mut self, volume: VolumeId, body: DescriptorBody) -> Seq {
        self.next += 1;
        let seq = Seq::new(self.next);
        let v = self.volumes.get_mut(&volume).unwrap();
        v.records.push(Descriptor { seq, time: WallTime::now(), body });
        seq
    }

    fn recorded(&self) -> Vec<VolumeId> {
        self.volumes.keys().copied().collect()
    }

    fn list(&self) -> Vec<VolumeStatus> {
        let status = |v: &Volume| VolumeStatus {
            info: v.info.clone(),
            order: v.order,
            reason: String::new(),
            copy: CopyProgress::default(),
            copy_waits: None,
            verify: VerifyProgress::default(),
            captured: v.records.last().map_or(Lsn::ZERO, |r| Lsn::new(self.epoch, r.seq)),
            released: v.released,
            durable: v.released,
            oldest_unreleased: WallTime::default(),
            pool_used: 0,
            pool_bytes: 0,
            clients: 0,
            writes: 0,
            written_bytes: 0,
            reads: 0,
            backing_errors: 0,
            intent: None,
            throttle: None,
            fenced: None,
            read_only: false,
        };
        self.volumes.values().map(status).collect()
    }
}

impl Volume {
    fn after(&self, epoch: Epoch, after: Lsn) -> Vec<Descriptor> {
        let later = |r: &&Descriptor| Lsn::new(epoch, r.seq) > after;
        self.records.iter().filter(later).cloned().collect()
    }
}
