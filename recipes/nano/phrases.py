"""Daily phrases in Mandarin and English, some of them mixed: a grammar, drawn from at random.

English is in lower case with apostrophes and no punctuation, Chinese in simplified characters without punctuation. Words
that sound the same in the same places are avoided (他 is here, 她 is not): no listener could tell them apart.

One phrase in twenty is held out by a hash of its characters, whatever template it came from: `draw` never returns one
unless asked to.
"""

from __future__ import annotations

import functools
import hashlib
import re
from typing import Literal

import numpy as np

Side = Literal["train", "held out"]

# Slots: alternatives between bars; {name} is another slot. An empty alternative leaves the slot out.
ENGLISH = {
    "they": "i|you|we|they|my parents|the children",
    "one": "he|she|mom|dad|grandma|grandpa|my sister|my brother|my son|my daughter|my wife|my husband|my uncle|my aunt|"
    "the doctor|the nurse|my friend|my neighbor|the teacher|{name}",
    "who": "mom|dad|grandma|grandpa|my sister|my brother|my son|my daughter|my wife|my husband|my uncle|my aunt|the doctor|"
    "the nurse|my friend|my neighbor|the teacher|{name}|him|her|them",
    "name": "anna|peter|lily|tom|mary|jack|emma|david|lucy|sam",
    "can": "want to|need to|like to|can|can't|will|have to|would like to|must|should|don't want to|used to|won't|"
    "are going to",
    "cans": "wants to|needs to|likes to|can|can't|will|has to|must|should|doesn't want to|is going to",
    "do": "drink {drink}|eat {food}|eat {food}|go to {place}|go to {place}|call {who}|take {medicine}|put on {clothes}|"
    "take off {clothes}|open {openable}|close {openable}|turn on {device}|turn off {device}|see {who}|talk to {who}|"
    "listen to {sound}|watch {show}|play {game}|read {reading}|wash {mine}|find {thing}|buy {goods}|{act}|{act}|clean {room}|"
    "cook {food}|wait for {who}|sit {where}|visit {who}|help {who}|move {limb}|wear {clothes}|look at {thing}",
    "act": "sit down|lie down|get up|go to bed|rest|sleep|brush my teeth|take a bath|take a shower|go outside|go home|"
    "use the toilet|stand up|wait here|come back|write a letter|go for a walk|sit in the sun|turn over|wake up|get dressed|"
    "comb my hair|have lunch|have breakfast|have dinner|be alone|learn to read|work|cry|laugh|sing a song|dance|swim|"
    "drive|breathe slowly|speak louder|try again|stay here|leave now|ask a question|say something|be quiet",
    "drink": "water|tea|coffee|milk|juice|orange juice|soup|beer|wine|hot water|cold water|warm milk|apple juice|lemon tea|"
    "a glass of water|a cup of tea|a cup of coffee|a bottle of milk",
    "food": "rice|bread|an apple|apples|a banana|fish|chicken|eggs|an egg|noodles|cake|cheese|soup|beef|pork|potatoes|"
    "tomatoes|carrots|cookies|chocolate|ice cream|a sandwich|salad|pizza|butter|honey|an orange|grapes|yogurt|cereal|pasta|"
    "beans|corn|onions|breakfast|lunch|dinner|fruit|vegetables|meat|sugar|something sweet",
    "place": "the park|the hospital|the kitchen|the bathroom|the bedroom|the garden|school|the store|the bank|church|"
    "the market|the office|the library|the beach|the station|the restaurant|the window|the door|work|town|the car|"
    "the pharmacy|the living room|my room|the airport|the river|the city|the village|the hotel|the museum",
    "medicine": "my medicine|the blue pill|the red pill|the white pill|two pills|one pill|my vitamins|a break|a nap|my time",
    "clothes": "my shoes|my coat|my hat|my socks|my shirt|my jacket|my gloves|my glasses|a sweater|the blue dress|my pants|"
    "the red scarf|a warm hat|my pajamas|my watch|my hearing aid",
    "openable": "the door|the window|the box|the bottle|the curtain|the bag|the book|the drawer|the letter|the gate|"
    "the fridge|the blinds",
    "device": "the light|the lamp|the tv|the radio|the music|the fan|the heater|the computer|the phone|the oven|the alarm|"
    "the camera|the water|the air conditioner",
    "sound": "music|the radio|the news|a story|the birds|the rain|my voice|this song|the teacher",
    "show": "tv|a movie|the news|football|the game|the birds|a film|the sunset|basketball|the clouds|cartoons",
    "game": "cards|chess|a game|football|the piano|the guitar|outside|tennis|with the dog|with the cat",
    "reading": "a book|the newspaper|the letter|a story|my email|the message|a magazine|the menu|a poem",
    "mine": "my hands|my face|my hair|my feet|the dishes|my shirt|the clothes|the car|the window|my arm",
    "limb": "my arm|my leg|my hand|my head|the chair|the bed|the table|my fingers|my left foot|my right hand",
    "where": "on the chair|on the sofa|on the bed|in the garden|by the window|next to me|in the wheelchair|at the table|"
    "outside|under the tree|behind the house|in front of the tv",
    "room": "the room|the kitchen|the table|the floor|my glasses|the bathroom|the house|the bedroom",
    "goods": "bread|milk|a new phone|a ticket|some fruit|a present|flowers|new shoes|a newspaper|eggs|stamps|a battery|"
    "soap|paper|a toothbrush|a {colour} shirt",
    "thing": "my glasses|my phone|the remote|the book|my bag|a towel|the blanket|my pillow|the key|the cup|a spoon|a fork|"
    "the knife|my wallet|the newspaper|a pen|some paper|my medicine|the box|my wheelchair|the umbrella|a tissue|"
    "the tablet|my cane|the plate|the bowl|a napkin|my charger|the {colour} bag|the {colour} cup|the {colour} blanket",
    "colour": "red|blue|green|yellow|white|black|brown|pink|orange|purple|gray",
    "when": "now|today|tonight|tomorrow|later|again|soon|this morning|this afternoon|this evening|after lunch|before dinner|"
    "every day|on {day}|at {hour} o'clock|in {number} minutes|next week|at night|first|with {who}|together|please",
    "day": "monday|tuesday|wednesday|thursday|friday|saturday|sunday",
    "month": "january|february|march|april|may|june|july|august|september|october|november|december",
    "hour": "one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve",
    "digit": "zero|one|two|three|four|five|six|seven|eight|nine",
    "number": "{hour}|{hour}|thirteen|fourteen|fifteen|sixteen|seventeen|eighteen|nineteen|{tens}|{tens} {unit}",
    "tens": "twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety",
    "unit": "one|two|three|four|five|six|seven|eight|nine",
    "things": "apples|books|children|sisters|brothers|dogs|cats|pills|letters|friends|dollars|cups|eggs|keys|questions|"
    "minutes|hours|days|weeks|months|years|bottles|pictures",
    "part": "head|back|leg|arm|hand|foot|knee|stomach|neck|shoulder|ear|eye|tooth|throat|chest|finger|mouth|nose|hip|toe",
    "side": "||left|right",
    "hurts": "hurts|hurts a lot|is cold|feels better|is numb|itches|is swollen|feels warm|still hurts|hurts {when}",
    "feeling": "tired|happy|sad|cold|hot|hungry|thirsty|sick|fine|angry|afraid|bored|dizzy|lonely|better|worried|sleepy|"
    "excited|nervous|proud|ready|comfortable|sorry|full|weak|strong|warm|late|lost|okay|good|bad|thankful",
    "very": "||very|so|a little|not|too|still|really",
    "adjective": "hot|cold|loud|bright|dark|big|small|heavy|hard|soft|dirty|clean|empty|broken|new|old|good|bad|beautiful|"
    "wet|dry|slow|fast|expensive|sweet|salty|high|low|wrong|right|open|closed|easy|difficult|far|near|short|long",
    "noun": "water|tea|coffee|soup|food|room|door|window|light|bed|chair|table|phone|house|car|music|weather|sun|book|"
    "box|bath|pillow|blanket|wheelchair|tv|milk|bread|garden|dog|cat|coat|clock|street|movie|number|story",
    "weather": "raining|snowing|sunny|windy|cloudy|cold outside|warm outside|dark outside|getting late|my birthday|"
    "monday|sunday|{hour} o'clock|summer|winter|spring|autumn|my turn|your turn|time to go|time for bed|time for lunch",
    "ask": "what time is it|what is this|what is that|who is that|who is there|how are you|where are you|where are we|"
    "what is your name|what day is it|can you hear me|do you understand|are you okay|what happened|what did you say|"
    "how much is it|when are you coming|who is coming|is it raining|what is for dinner|did you sleep well|"
    "how was your day|what do you think|why not|which one|how long|how many|whose is this|are you there",
    "call": "yes|no|help|stop|water|toilet|pain|more|hello|please|thank you|good morning|good night|goodbye|okay|sorry|"
    "wait|enough|again|maybe|food|medicine|nurse|doctor|mom|dad|home|hot|cold|tired|hungry|thirsty|left|right|up|down|"
    "slowly|now|later|finished|excuse me|you're welcome|i don't know|i understand|i love you|leave me alone|come here|"
    "go away|be careful|look|listen|open|close|good|bad|ready|not yet|of course|no thank you|yes please|that's right|"
    "happy birthday|see you later|me too|i'm here|never mind|let's go|call for help|it's an emergency|too much",
    "sentence": "{they} {can} {do}|{they} {can} {do}|{they} {can} {do} {when}|{one} {cans} {do}|{one} {cans} {do} {when}|"
    "please {do}|please {do} {when}|can you {do}|can you {do} {when}|could you help me {do}|help me {do}|let's {do}|"
    "let's {do} {when}|don't {do}|don't {do} {when}|{do}|{do}|{do} {when}|please give me {thing}|bring me {thing}|"
    "give me {drink}|give me {food} {when}|where is {thing}|where is {one}|where are the {things}|i can't find {thing}|"
    "my {side} {part} {hurts}|my {side} {part} {hurts}|i feel {very} {feeling}|i am {very} {feeling} {when}|i'm {very} {feeling}|"
    "are you {feeling}|{one} is {very} {feeling}|{they} are {feeling} {when}|the {noun} is {very} {adjective}|"
    "the {noun} is {very} {adjective}|this {noun} is {adjective}|it's too {adjective}|it's {weather}|is it {weather}|"
    "i have {number} {things}|there are {number} {things}|{number} more {things}|my number is {digit} {digit} {digit}|"
    "{digit} {digit} {digit} {digit}|it is {day} the {nth} of {month}|see you on {day}|i was born in {month}|{ask}|{ask}|"
    "is {one} at home|is {one} coming {when}|when is {one} coming|when can we {do}|why can't i {do}|i like {food}|"
    "i don't like {food}|i like {food} and {drink}|do you have {food}|i want {thing} and {thing}|thank you {name}|"
    "good morning {name}|hello {who}|i love you {name}|i miss {who}|put {thing} {where}|the {colour} {noun}|"
    "i need {thing}|i need {drink} {when}|i want {food}|i want {drink} please|{thing} is {where}|tell {who} i'm {feeling}",
    "nth": "first|second|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth",
}

CHINESE = {
    "人": "我|你|他|我们|你们|他们|妈妈|爸爸|爷爷|奶奶|哥哥|姐姐|弟弟|妹妹|儿子|女儿|医生|护士|老师|朋友|阿姨|叔叔|孩子|邻居|外婆|外公|{名}",
    "谁": "妈妈|爸爸|爷爷|奶奶|哥哥|姐姐|弟弟|妹妹|儿子|女儿|医生|护士|老师|朋友|阿姨|叔叔|外婆|外公|你|他|{名}",
    "名": "小明|小红|小李|小王|老张|阿丽|小芳|小林",
    "想": "想|要|不想|需要|喜欢|可以|现在想|不能|应该|会|必须|也想|不要|正在|已经|马上|还想|经常|不喜欢|打算|愿意",
    "做": "喝{饮}|喝{饮}|吃{食}|吃{食}|去{地}|去{地}|回{家}|看{看}|听{听}|打开{开}|关上{开}|开{电}|关{电}|穿{衣}|脱{衣}|找{谁}|叫{谁}|"
    "给{谁}打电话|洗{洗}|买{买}|拿{物}|用{物}|{动}|{动}|{动}|擦{擦}|换{衣}|和{谁}说话|见{谁}|等{谁}|帮{谁}{动}|玩{玩}|读{读}|坐{坐}",
    "动": "睡觉|休息|起床|洗澡|上厕所|散步|出去|刷牙|洗脸|吃药|打针|坐下|躺下|站起来|翻身|晒太阳|写字|唱歌|跳舞|上班|上学|回来|"
    "聊天|做饭|吃饭|喝水|看病|锻炼|运动|打扫|理发|画画|下棋|打牌|游泳|走路|跑步|学习|说话|出门|量血压|按摩|剪指甲|梳头|穿衣服|拍照|"
    "开车|买菜|购物|睡午觉|吃早饭|吃午饭|吃晚饭|慢慢走|大声说|再试一次",
    "饮": "水|茶|牛奶|咖啡|果汁|热水|温水|豆浆|汤|可乐|酒|粥|一杯水|一杯茶|冷水|酸奶|绿茶|蜂蜜水|鸡汤|橙汁",
    "食": "苹果|香蕉|米饭|面条|包子|饺子|鸡蛋|面包|蛋糕|西瓜|葡萄|橘子|鱼|鸡肉|牛肉|猪肉|豆腐|青菜|土豆|西红柿|玉米|饼干|糖|水果|"
    "馒头|花生|早饭|午饭|晚饭|白菜|胡萝卜|虾|梨|草莓|巧克力|冰淇淋|火锅|烤鸭|月饼|药",
    "地": "医院|公园|学校|超市|厨房|厕所|卧室|客厅|阳台|楼下|外面|银行|车站|商店|图书馆|北京|上海|花园|教室|菜市场|药店|机场|饭店|"
    "邮局|海边|河边|山上|城里|广州|台北|香港|办公室|那边|这里",
    "家": "家|房间|学校|老家|床上|医院",
    "看": "电视|电影|书|新闻|报纸|医生|手机|照片|比赛|花|雪|月亮|星星|球赛|风景|动画片|孩子",
    "听": "音乐|收音机|故事|新闻|歌|广播|京剧|鸟叫|老师的话|我说",
    "开": "门|窗户|箱子|瓶子|窗帘|冰箱|抽屉|盒子|书|柜子|大门",
    "电": "灯|电视|空调|电脑|风扇|收音机|暖气|洗衣机|手机|电灯|音乐|闹钟",
    "衣": "衣服|鞋子|袜子|外套|毛衣|帽子|裤子|手套|裙子|衬衫|睡衣|红衣服|围巾|拖鞋|大衣",
    "洗": "手|脸|头|脚|衣服|碗|水果|头发|杯子|车",
    "买": "菜|水果|衣服|药|手机|报纸|面包|礼物|电池|花|车票|牛奶|牙刷|肥皂|鞋子|书包",
    "物": "手机|眼镜|毛巾|杯子|遥控器|钥匙|枕头|被子|纸巾|轮椅|拐杖|雨伞|钱包|碗|筷子|勺子|书包|笔|药|剪刀|电话|书|本子|椅子|盘子|"
    "牙刷|报纸|充电器|助听器|{色}杯子|{色}毛巾|{色}书包",
    "色": "红|蓝|绿|黄|白|黑|紫|灰|粉",
    "擦": "桌子|脸|手|嘴|窗户|眼镜|地板|汗",
    "玩": "游戏|手机|电脑|球|牌|积木|玩具",
    "读": "书|报纸|信|故事|课文|邮件",
    "坐": "轮椅|沙发上|椅子上|公交车|地铁|飞机|火车|床边|窗边|我旁边|出租车",
    "时": "今天|明天|昨天|现在|早上|晚上|下午|上午|中午|周末|星期{日}|{点}点|一会儿|后天|下个月|今年|明年|以后|刚才|每天|{月}月|"
    "饭前|饭后|夜里|下星期|春天|夏天|秋天|冬天",
    "日": "一|二|三|四|五|六|天",
    "点": "一|两|三|四|五|六|七|八|九|十|十一|十二",
    "月": "一|二|三|四|五|六|七|八|九|十",
    "数": "一|二|三|四|五|六|七|八|九|十|零",
    "多": "两|三|四|五|六|七|八|九|十|十五|二十|三十|五十|一百|几|好多|十二|二十四|三十六|九十八|六十七",
    "量": "个人|个苹果|本书|杯水|次|天|分钟|个小时|岁|块钱|片药|只猫|条狗|张纸|个孩子|公斤|度|碗饭|瓶牛奶|年|个月|位老师|辆车|把椅子",
    "部": "头|手|脚|腿|背|腰|肚子|胃|眼睛|耳朵|牙|嗓子|胸口|脖子|肩膀|膝盖|胳膊|手指|鼻子|心里|嘴|舌头|后背|左手|右手|左腿|右脚",
    "感": "疼|很疼|不舒服|有点疼|冷|麻|痒|很难受|不疼了|肿了|没力气|发热|好多了|又疼了|动不了",
    "情": "高兴|难过|累|饿|渴|冷|热|困|害怕|生气|孤单|无聊|着急|开心|头晕|舒服|担心|想家|满意|紧张|感动|伤心|安静|放心|后悔|寂寞",
    "很": "很|有点|不|非常|太|好|真|特别|已经不",
    "形": "热|冷|大|小|好看|好吃|干净|脏|吵|亮|暗|贵|便宜|远|近|长|短|重|轻|硬|软|甜|咸|酸|苦|辣|快|慢|新|旧|高|低|方便|危险|难|容易|漂亮",
    "名词": "水|茶|汤|饭|菜|房间|衣服|灯光|声音|床|椅子|天气|苹果|电视|电影|手机|枕头|被子|轮椅|窗户|外面|药|路|花|音乐|车|鞋子|空气|"
    "题目|故事|味道|颜色|太阳|桌子|雨|风",
    "问": "几点了|这是什么|那是谁|你好吗|你在哪里|你叫什么名字|今天星期几|你听见了吗|你懂了吗|怎么了|多少钱|你什么时候来|谁来了|"
    "外面下雨吗|晚饭吃什么|睡得好吗|为什么|哪一个|可以吗|好不好|怎么办|要多久|有没有人|对不对|你说什么|是不是你|还有多远|行吗",
    "叫": "是|不|好|不好|救命|停|水|厕所|疼|还要|你好|谢谢|早上好|晚安|再见|对不起|等一下|够了|再来|可能|吃饭|吃药|护士|医生|妈妈|爸爸|"
    "回家|热|冷|累|饿|渴|左边|右边|上面|下面|慢一点|快一点|现在|以后|完了|不客气|我不知道|我明白|我爱你|过来|走开|小心|看|听|打开|"
    "关上|准备好了|还没有|当然|不用了|没关系|生日快乐|我也是|我在这里|算了|走吧|快来人|太多了|行|没事|请进|加油|新年快乐|辛苦了|帮帮我|不对",
    "句": "{人}{想}{做}|{人}{想}{做}|{人}{想}{做}|{人}{时}{想}{做}|{时}{人}{想}{做}|请{做}|请帮我{做}|请帮我{做}|帮我{做}|我们{做}吧|"
    "{时}我们{做}吧|不要{做}|别{做}|{做}|{做}|{时}{做}|请给我{物}|给我{饮}|给我{食}|把{物}给我|把{物}拿过来|把{物}给{谁}|我的{物}在哪里|"
    "{物}在{地}|{谁}在{地}吗|{谁}在哪里|我找不到{物}|我{部}{感}|我{部}{感}|{时}我{部}{感}|我{很}{情}|我{很}{情}|{人}{很}{情}|"
    "我{时}{很}{情}|你{情}吗|{名词}{很}{形}|{名词}{很}{形}|这个{名词}太{形}了|今天{很}{形}|现在{点}点|我有{多}{量}|还有{多}{量}|"
    "等{多}{量}|{多}{量}|我的电话是{数}{数}{数}{数}|{数}{数}{数}{数}|{问}|{问}|{谁}什么时候{动}|我们什么时候{做}|为什么不能{做}|我喜欢{食}|"
    "我不喜欢{食}|我要{食}和{饮}|有没有{食}|我要{物}和{物}|谢谢{谁}|{谁}早上好|{谁}你好|我爱{谁}|我想{谁}|{人}来了|{人}走了|今天{月}月{数}号|"
    "{谁}说他{很}{情}|告诉{谁}我{很}{情}|让{谁}来|请{谁}帮我{动}|我刚才{动}了|你会{动}吗|我不会{动}|我没有{物}|这是我的{物}|那是{谁}的{物}",
}

MIXED = {
    "东西": "pizza|coffee|sandwich|ice cream|salad|cake|cheese|juice",
    "机器": "wifi|tv|email|app|video|ipad|computer|radio",
    "话": "ok|hello|sorry|thank you|bye bye|please|yes|no",
    "句": "我想吃 {东西}|我要一个 {东西}|给我 {东西}|打开 {机器}|关掉 {机器}|我的 {机器} 坏了|{话} 妈妈|{话} 医生|{话} 我要回家|"
    "我说 {话}|帮我看 {机器}|{话} 再见|我喜欢 {东西}|今天有 {东西} 吗|please 给我{饮}|please 帮我{动}|help 我{部}疼|{话} 我{很}{情}|"
    "我在看 {机器}|他不会用 {机器}|这个 {东西} 很好吃|{时}没有 {机器}|{谁}要 {东西}|{谁}在看 {机器}|你的 {机器} 在{地}",
}

_SENTENCE = {"en": "sentence", "zh": "句"}
_MOST = {"en": 9, "zh": 14}  # words of English, characters of Chinese


def expand(slot: str, grammar: dict[str, str], random: np.random.Generator) -> str:
    choices = grammar[slot].split("|")
    text = choices[random.integers(len(choices))]
    return re.sub(r"\{(\w+)\}", lambda match: expand(match[1], grammar, random), text)


def held_out(text: str) -> bool:
    """Whether this phrase is kept out of training: decided by its characters alone."""
    return hashlib.sha256(text.replace(" ", "").encode()).digest()[0] < 13  # 13 of 256: 5.1 %


def length(text: str) -> int:
    """Words of English plus characters of Chinese."""
    return len(re.findall(r"[一-鿿]|[a-z']+", text))


def draw(
    language: Literal["en", "zh"], random: np.random.Generator, side: Side = "train", most: int | None = None
) -> str:
    """One phrase of at most `most` words or characters (9 and 14 by default). One Chinese phrase in twenty is mixed with English."""
    limit = min(most or 99, _MOST[language])
    grammar = ENGLISH if language == "en" else CHINESE
    while True:
        kind = random.random()
        if kind < 0.72:
            text = expand(_SENTENCE[language], grammar, random)
        elif language == "zh" and kind < 0.77:
            text = expand("句", CHINESE | MIXED, random)
        else:  # parts on their own and in senseless lists: each is heard often, and no part is guessed from its neighbours
            parts = _parts(language)
            count = 1 if kind < 0.88 else int(random.integers(2, 5))
            text = (" " if language == "en" else "").join(parts[random.integers(len(parts))] for _ in range(count))
        text = " ".join(text.split())
        if length(text) <= limit and held_out(text) == (side == "held out"):
            return text


@functools.cache
def _parts(language: str) -> list[str]:
    """Every alternative of every slot that names no other slot, once."""
    grammar = ENGLISH if language == "en" else CHINESE
    return sorted({part for choices in grammar.values() for part in choices.split("|") if part and "{" not in part})


def vocabulary() -> tuple[list[str], list[str]]:
    """All English words and all Chinese characters that the grammar can say, sorted."""
    text = "|".join([*ENGLISH.values(), *CHINESE.values(), *MIXED.values()])
    plain = re.sub(r"\{\w+\}", " ", text)
    return sorted(set(re.findall(r"[a-z']+", plain))), sorted(set(re.findall(r"[一-鿿]", plain)))
